"""Rows of several samples (``matvlm.data.packing``): whether a model keeps them apart, and how to tell it of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from matvlm.models.families import BIDIRECTIONAL

LEAK = 0.1
"""What a change of one sample may do to its neighbour, as a share of what it does without packing. Measured over the
families of the tests, in float32 and bfloat16: at most 4e-8 where samples are kept apart, 0.6 and more where the mixers
are not told of them, 0.5 and more where the attentions are not."""


def check(model: PreTrainedModel) -> None:
    """Refuse a ``model``, hybrid or not, that does not keep the samples of packed rows apart.

    What its text layers do is tried out, with two rows of twelve tokens.

    Raises:
        ValueError: a family whose images need more than that, or samples that see each other; with the reason.
    """
    kind = model.config.model_type
    config = model.config.get_text_config(decoder=True)
    advice = "pack no samples with it"
    if kind in BIDIRECTIONAL:
        raise ValueError(f"{kind}: {BIDIRECTIONAL[kind]} attend to each other in both directions: {advice}")
    if (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        raise ValueError(f"{kind}: positions in an image have height and width (mrope), which rows lack: {advice}")
    leak = _leak(model)
    if not leak < LEAK:
        attention = config._attn_implementation
        raise ValueError(
            f"{kind} with {attention} attention: of what a token does to those after it, {leak:.0%} reach the next "
            f"sample of a packed row: choose another attention (sdpa), or {advice}"
        )


@contextmanager
def unpacked() -> Iterator[None]:
    """Inside, every row is one sample, and transformers makes its masks knowing that.

    Else it looks at the positions of rows to find out, for which the host waits until the GPU has done all that it was
    given; and while a CUDA graph is recorded, where it cannot look, it makes a mask even where a causal kernel needs
    none.
    """
    with (
        patch.object(masking_utils, "find_packed_sequence_indices", lambda _positions: None),
        patch.object(masking_utils, "is_tracing", lambda *_tensors: False),
    ):
        yield


@torch.no_grad()
def _leak(model: PreTrainedModel) -> float:
    """What other tokens in a row's first six do to its last six when packed, as a share of what they do when not."""
    embed = model.get_input_embeddings()
    vocabulary = embed.weight.shape[0]
    shared, first, other = (torch.arange(6) * step % vocabulary for step in (7, 11, 13))
    ids = torch.stack([torch.cat([first, shared]), torch.cat([other, shared])]).to(embed.weight.device)
    tokens = torch.arange(12, device=ids.device).repeat(2, 1)
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        packed = _effect(model, embed(ids), position_ids=tokens % 6, seq_idx=(tokens // 6).int())
        plain = _effect(model, embed(ids))
    finally:
        for module in training:
            module.training = True
    return packed / max(plain, 1e-30)


def _effect(model: PreTrainedModel, embeddings: Tensor, **positions: Tensor) -> float:
    """How far the two rows' last six hidden states are apart."""
    hidden: Tensor = model.base_model(inputs_embeds=embeddings, **positions, use_cache=False).last_hidden_state
    return float((hidden[0, 6:] - hidden[1, 6:]).float().norm())
