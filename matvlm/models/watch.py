"""What the attentions of a model are given and give, seen in one pass without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.models.patch import forward_as


class Seen(NamedTuple):
    """Of one attention: what it was given, ``hidden`` [B, L, W] and the other keyword arguments, and its output."""

    hidden: Tensor
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def watching(attentions: Mapping[int, nn.Module], last: int | None = None) -> Iterator[dict[int, Seen]]:
    """Inside, whatever runs ``attentions``, by layer number, fills the dictionary; the block ends behind ``last``."""
    seen: dict[int, Seen] = {}

    def remembering(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable(recursive=False)
        def run(*, hidden_states: Tensor, **kwargs: Any) -> Any:
            output = forward(hidden_states=hidden_states, **kwargs)
            seen[layer] = Seen(hidden_states, kwargs, output[0])
            if layer == last:
                raise _Enough
            return output

        return run

    with ExitStack() as stack:
        for layer, module in attentions.items():
            stack.enter_context(forward_as(module, remembering(layer, module.forward)))
        with suppress(_Enough):
            yield seen


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
