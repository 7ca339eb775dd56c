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


@dataclass
class Prompt:
    """Shapes: B sequences, padded on the left to L tokens."""

    ids: Tensor
    """int64 [B, L]."""
    first: Tensor
    """int64 [B]: the column in which each begins."""
    positions: Tensor
    """[B, L], or [A, B, L] of models whose positions have several axes."""
    arguments: dict[str, Any]
    """What the decoder is called with besides: embeddings or ids [B, L, ...], the mask [B, L] or made from it."""

    def part(self, start: int, stop: int) -> dict[str, Any]:
        """The decoder's arguments for the columns ``start`` to ``stop``, after those before."""
        length = self.ids.shape[1]
        cut: dict[str, Any] = {"position_ids": self.positions[..., start:stop]}
        for name, value in self.arguments.items():
            if name == "attention_mask":
                cut[name] = _cut_mask(value, start, stop)
            elif isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length:
                cut[name] = value[:, start:stop]
            else:
                cut[name] = value
        return cut


@torch.inference_mode()
def read_prompt(model: PreTrainedModel, inputs: Mapping[str, Any], cache: DecodingCache) -> Prompt:
    """Run ``model`` on ``inputs`` as far as its text decoder: a vision tower runs, no decoder layer does.

    Args:
        inputs: as a processor makes them: input_ids int64 [B, L], attention_mask [B, L] if there is padding, images.

    Raises:
        ValueError: padding that is not on the left, or nothing else.
    """
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: padding must be on the left (processor.tokenizer.padding_side = 'left')")
    if bool((mask[:, -1:] == 0).any()):
        raise ValueError("attention_mask: a sequence of nothing but padding")
    padded = bool((mask == 0).any())
    seen: dict[str, Any] = {}

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        if args:
            seen["input_ids"] = args[0]
        raise _Seen

    with forward_as(model.get_decoder(), look), suppress(_Seen):
        model.base_model(**{**inputs, "attention_mask": mask}, past_key_values=cache, use_cache=True)
    positions = _positions(seen.pop("position_ids", None), mask)
    for name in ("past_key_values", "use_cache", "cache_position", "return_dict"):
        seen.pop(name, None)
    if not padded and not isinstance(seen.get("attention_mask"), dict):
        seen["attention_mask"] = None
    arguments = {name: value for name, value in seen.items() if value is not None}
    first = (mask == 0).sum(-1, dtype=torch.long)
    return Prompt(ids, first, positions, arguments)


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


def _cut_mask(mask: Any, start: int, stop: int) -> Any:
    """A mask [B, L] or [B, 1, L, L], or several by kind of layer, for the tokens from ``start`` to ``stop``."""
    if isinstance(mask, Mapping):
        return {kind: _cut_mask(each, start, stop) for kind, each in mask.items()}
    if not isinstance(mask, Tensor):
        return mask
    return mask[:, :stop] if mask.dim() == 2 else mask[:, :, start:stop, :stop]
