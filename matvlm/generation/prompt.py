"""A prompt as the text decoder gets it: embeddings with images in their places, and where each token stands."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.generation.cache import DecodingCache
from matvlm.models.patch import forward_as

PLUMBING = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
"""Of what decoders are called with, that which a ``Prompt`` makes anew for each part."""


@dataclass(frozen=True)
class Prompt:
    """Shapes: B sequences, padded on the left to L tokens."""

    ids: Tensor
    """int64 [B, L]."""
    embeddings: Tensor | None
    """[B, L, W] with images in their places; None where the decoder looks ``ids`` up itself."""
    positions: Tensor
    """[B, L], or [A, B, L] of models whose positions have several axes."""
    first: Tensor
    """int64 [B]: the column in which each begins."""
    mask: Tensor | None
    """[B, L], 0 for padding; None where there is none."""

    def part(self, start: int, stop: int) -> dict[str, Tensor | None]:
        """The decoder's arguments for the columns ``start`` to ``stop``, after those before."""
        tokens = {"input_ids": self.ids} if self.embeddings is None else {"inputs_embeds": self.embeddings}
        return {
            **{name: value[:, start:stop] for name, value in tokens.items()},
            "position_ids": self.positions[..., start:stop],
            "attention_mask": None if self.mask is None else self.mask[:, :stop],
        }


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, inputs: Mapping[str, Any], cache: DecodingCache) -> Prompt:
    """Run ``model`` on ``inputs`` as far as its text decoder: a vision tower runs, no decoder layer does.

    Args:
        inputs: as a processor makes them: input_ids int64 [B, L], attention_mask [B, L] if there is padding, images.

    Raises:
        ValueError: padding that is not on the left, or nothing else; or a decoder that is given more than tokens.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: padding must be on the left (processor.tokenizer.padding_side = 'left')")
    if bool((mask[:, -1:] == 0).any()):
        raise ValueError("attention_mask: a sequence of nothing but padding")
    seen: dict[str, Any] = {}

    def look(**kwargs: Any) -> Any:
        seen.update(kwargs)
        raise _Seen

    with forward_as(model.get_decoder(), look), suppress(_Seen):
        model.base_model(**{**inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True)
    more = [
        name
        for name, value in seen.items()
        if name not in PLUMBING and isinstance(value, Tensor | Mapping | list | tuple)
    ]
    if more:
        raise ValueError(
            f"{type(model).__name__}: its decoder is given {', '.join(more)} too, which the engine does not know: use "
            "generate()"
        )
    positions, first = _positions(seen.get("position_ids"), mask), (mask == 0).sum(-1)
    return Prompt(ids, seen.get("inputs_embeds"), positions, first, mask if bool(first.any()) else None)


class _Seen(Exception):
    """The decoder has been called."""


def _positions(given: Tensor | None, mask: Tensor) -> Tensor:
    """Those that the decoder was ``given``, unless they count padding: then counted from the first real token on."""
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    if given is None:
        return counted
    if given.dim() == 2 and bool((given.diff(dim=-1) == 1).all()):
        return counted + given[:, :1]  # paligemma counts from 1
    return given
