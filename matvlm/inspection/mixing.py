"""How a decoder layer mixes tokens: attention's map, and the matrix that a Mamba-2 scan stands for.

A scan is linear in what it is given, ``y = M x`` for each head, with (Dao and Gu, arXiv 2405.21060; the letters are
those of ``matvlm.kernels.ssd``)

    M[t, s] = (C[t] . B[s]) * exp(sum over s < r <= t of dt[r] * A) * (dt[s] or 1)   for s < t, and 0 for s > t
    M[t, t] = (C[t] . B[t]) * (dt[t] or 1) + D

B and C are those that the scan gets: behind convolution, norms and rotation. In the place of M attention has its map,
``softmax(q k)``. Shapes: H heads, L tokens; the first token of a pair is the one that reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.kernels.ssd import ssd_scan
from matvlm.models import mixer as mixer_module
from matvlm.models.hybrid import decoder_layers
from matvlm.models.mixer import Mamba2Mixer
from matvlm.models.watch import Seen, real_tokens, watch


@torch.no_grad()
def mixing_matrix(model: PreTrainedModel, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """What layer number ``layer`` of the decoder multiplies its values with, while ``model`` reads ``inputs``.

    Args:
        model: hybrid or not, in evaluation mode. It is not changed.
        inputs: of one sample without padding, as a processor makes them; moved to the model's device and dtype.

    Returns:
        float32 [H, L, L] on the model's device. A row of an attention's sums to 1. A mixer's may hold negative numbers
        and has no scale of its own, since a norm of each head follows.

    Raises:
        ValueError: no such layer, more than one sample, or padding.
    """
    decoder: Any = decoder_layers(model)
    if not 0 <= layer < len(decoder):
        raise ValueError(f"layer {layer} does not exist: the model has layers 0 to {len(decoder) - 1}")
    real = real_tokens(inputs)
    if real.shape[0] != 1 or not real.all():
        raise ValueError(
            f"{real.shape[0]} samples, {int((~real).sum())} tokens of padding: give one sample without any"
        )
    module = decoder[layer].self_attn
    moved = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    with _eager(model):
        shown = watch(model, {layer: module}, moved)[layer]
        if isinstance(module, Mamba2Mixer):
            return _scanned_identity(module, shown)
        _, weights = module(hidden_states=shown.hidden, **shown.kwargs)
    return weights[0].float()


def row_likeness(first: Tensor, second: Tensor) -> Tensor:
    """How alike what a token takes from which others is: cosine of the rows of two [H, L, L], mean over L -> [H].

    At most 1. A row's scale does not count, and a mixer's has none; what counts is where a token looks.
    """
    return F.cosine_similarity(first, second, dim=-1).mean(-1)


def mean_distance(matrix: Tensor) -> Tensor:
    """How many tokens back each head looks: [H, L, L] -> [H], mean of a row's distances, weighted by its entries' size.

    The tokens of a row's future (of an image that looks both ways) count as no distance.
    """
    tokens = torch.arange(matrix.shape[-1], device=matrix.device)
    back = (tokens[:, None] - tokens).clamp_min(0)
    weights = matrix.abs()
    return ((weights * back).sum(-1) / weights.sum(-1)).mean(-1)


def _scanned_identity(mixer: Mamba2Mixer, shown: Seen) -> Tensor:
    """The matrix of a linear map is what it makes of the identity: here of one token at a time as the input."""
    with patch.object(mixer_module, "ssd_scan", wraps=ssd_scan) as scan:
        mixer(hidden_states=shown.hidden, **shown.kwargs)
    call = scan.call_args
    given = inspect.signature(ssd_scan).bind(*call.args, **call.kwargs).arguments
    _, length, heads, _ = given["x"].shape
    one_each = torch.eye(length, device=given["x"].device)[None, :, None].expand(-1, -1, heads, -1)
    columns, _ = ssd_scan(**{**given, "x": one_each, "backend": "torch"})
    return columns[0].transpose(0, 1)


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the text decoder's attentions compute their maps and return them."""
    config: Any = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = before
