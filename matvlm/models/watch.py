"""What the attentions of a model are given and give, seen in one pass without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Seen(NamedTuple):
    """Of one attention: what it was given, ``hidden`` [B, L, W] and the other keyword arguments, and its output."""

    hidden: Tensor
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def watching(attentions: Mapping[int, nn.Module], last: int | None = None) -> Iterator[dict[int, Seen]]:
    """Inside, whatever runs ``attentions``, by layer number, fills the dictionary; the block ends behind ``last``."""
    seen: dict[int, Seen] = {}

    def remember(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            seen[layer] = Seen(kwargs["hidden_states"], rest, output[0])
            if layer == last:
                raise _Enough

        return hook

    hooks = [module.register_forward_hook(remember(layer), with_kwargs=True) for layer, module in attentions.items()]
    try:
        yield seen
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def watch(model: PreTrainedModel, attentions: Mapping[int, nn.Module], inputs: Mapping[str, Tensor]) -> dict[int, Seen]:
    """Run ``model`` on ``inputs`` as far as the last of ``attentions``, which are its own, by layer number."""
    with watching(attentions, last=max(attentions)) as seen:
        model.base_model(**inputs, use_cache=False)
    return seen


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which tokens of ``inputs`` are not padding, bool [B, L]."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


class _Enough(Exception):
    """The model has run as far as it is needed."""
