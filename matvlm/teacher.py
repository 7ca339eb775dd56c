"""The teacher's side of distillation: its logits where a loss is taken, and a fingerprint of its weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matvlm.data.encoding import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's logits at the positions of ``batch.kept``, sample by sample: float32 [P, V].

    The head sees the kept hidden states only, so the full [B, L, V] logits never exist. The model's own forward applies
    it, which keeps any scaling or soft-capping a family does there. Gradients flow unless the caller switches them off.
    """
    kept = batch.kept

    def keep(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
        outputs.last_hidden_state = outputs.last_hidden_state[kept][None]
        return outputs

    hook = model.base_model.register_forward_hook(keep)
    try:
        return model(**batch.inputs, use_cache=False).logits[0].float()
    finally:
        hook.remove()


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 (hex) over the names, types, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
