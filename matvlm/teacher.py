"""The teacher's side of distillation: its logits where a loss is taken, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from matvlm.data.encoding import Batch
from matvlm.models.patch import forward_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's logits at the positions of ``batch.kept``, sample by sample: float32 [P, V].

    The head sees the kept hidden states only, so the full [B, L, V] logits never exist. Gradients flow unless the
    caller switches them off.
    """
    return head(model, kept_hidden(model, batch)).float()


def kept_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What the head is given at the positions of ``batch.kept``: the last hidden states [P, H], sample by sample."""
    hidden: Tensor = model.base_model(**batch.inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[batch.kept_places]


def head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits [P, V] of last hidden states [P, H], in the type that the head has.

    The model's own forward applies it, with ``hidden`` for the output of what comes before; that keeps any scaling or
    soft-capping a family does there.
    """
    with forward_as(model.base_model, lambda *_args, **_kwargs: LastHidden(hidden[None])):
        logits: Tensor = model(use_cache=False).logits
    return logits[0]


class LastHidden:
    """A base model's output of which only the last hidden states [B, L, H] are there; everything else is None."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the names, types, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
