"""Alignment: mixers learn, each by itself, to answer as the attention in whose place they are to be put.

One pass of the teacher, without gradient, shows every attention's input and output. A mixer is fed that same input and
regressed on that output, so the mixers of all layers, and any number of candidates for one layer, learn from the same
pass and independently of each other. It is the layer loss of arXiv 2503.13440 without the hybrid around it, and what
arXiv 2408.10189 (hidden-state alignment) and arXiv 2410.10254 (attention transfer) put before distillation.

Shapes: B samples, L tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.config import Optimizer
from matvlm.losses import layer_l2
from matvlm.models.hybrid import decoder_layers
from matvlm.models.mixer import Mamba2Mixer
from matvlm.models.watch import Seen, real_tokens, watch
from matvlm.optimizer import adamw

Candidates = Mapping[str, Mapping[int, Mamba2Mixer]]
"""Candidate's name -> layer number -> mixer."""


class Curve(NamedTuple):
    """A mixer's error before each update, on a batch that it had not seen unless the batches repeat."""

    loss: list[float]
    """``mean over real tokens and H of (mixer - attention)^2``."""
    relative: list[float]
    """The same, divided by the variance of the attention's output over real tokens: 1 is as good as its mean."""


def align(
    model: PreTrainedModel,
    candidates: Candidates,
    batches: Iterable[Mapping[str, Tensor]],
    optimizer: Optimizer,
    autocast: torch.dtype | None = None,
    on_update: Callable[[int], None] | None = None,
) -> dict[str, dict[int, Curve]]:
    """Train ``candidates`` in place on what the attentions of ``model`` do, one update per batch.

    What is minimised is the relative error (see ``Curve``), so that learning rate and clipping mean the same in every
    layer. AdamW, constant learning rate; the gradient is clipped mixer by mixer. Nothing is drawn at random.

    Args:
        model: the teacher, whole, in evaluation mode. It is not changed.
        candidates: mixers on the model's device; they become float32.
        batches: inputs of the model, padded or not, moved to its device; ``attention_mask`` [B, L] is optional.
        optimizer: learning rate, betas, weight decay and the largest gradient norm of a mixer.
        autocast: dtype of the matrix products, or None for that of the weights.
        on_update: called with the number of updates done, after each.

    Returns:
        A curve per candidate and layer, of as many points as there were batches.

    Raises:
        ValueError: a layer named by ``candidates`` does not exist or is no attention any more.
    """
    wanted = _attentions(model, {layer for mixers in candidates.values() for layer in mixers})
    trained = [(name, layer, mixer.float()) for name, mixers in candidates.items() for layer, mixer in mixers.items()]
    steps = {(name, layer): _Stepper(mixer, optimizer) for name, layer, mixer in trained}
    errors: dict[tuple[str, int], list[Tensor]] = {place: [] for place in steps}
    for update, batch in enumerate(batches, start=1):
        inputs = {name: value.to(model.device, non_blocking=True) for name, value in batch.items()}
        real = real_tokens(inputs)
        with _casting(model, autocast):
            seen = watch(model, wanted, inputs)
        spread = {layer: _variance(shown.output[real]) for layer, shown in seen.items()}
        for name, layer, mixer in trained:
            with _casting(model, autocast):
                error = _error(mixer, seen[layer], real)
            steps[name, layer](error / spread[layer])
            errors[name, layer].append(torch.stack([error.detach(), spread[layer]]))
        if on_update:
            on_update(update)
    return {name: {layer: _curve(errors[name, layer]) for layer in mixers} for name, mixers in candidates.items()}


class _Stepper:
    """One mixer's optimiser: a call takes the step that lowers its loss."""

    def __init__(self, mixer: Mamba2Mixer, settings: Optimizer):
        self.parameters = list(mixer.requires_grad_().parameters())
        self.most = settings.clip_grad_norm
        self.optimizer = adamw(self.parameters, settings, fused=True)

    def __call__(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.most)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _attentions(model: PreTrainedModel, layers: set[int]) -> dict[int, nn.Module]:
    decoder: Any = decoder_layers(model)
    if not layers or not layers <= set(range(len(decoder))):
        raise ValueError(f"cannot align layers {sorted(layers)}: the model has layers 0 to {len(decoder) - 1}")
    attentions = {layer: decoder[layer].self_attn for layer in sorted(layers)}
    replaced = [layer for layer, attention in attentions.items() if isinstance(attention, Mamba2Mixer)]
    if replaced:
        raise ValueError(f"layers {replaced} are Mamba-2 already: align with the original model")
    return attentions


def _error(mixer: Mamba2Mixer, shown: Seen, real: Tensor) -> Tensor:
    """Mean over real tokens and H, float32 scalar with gradient."""
    output, _ = mixer(hidden_states=shown.hidden.float(), **shown.kwargs)
    return layer_l2(output, shown.output, real) / real.sum()


def _variance(outputs: Tensor) -> Tensor:
    """Of [tokens, H] over the tokens, mean over H, float32; 1 for an attention that always answers the same."""
    variance = outputs.float().var(dim=0, correction=0).mean()
    return torch.where(variance > 0, variance, 1.0)


def _curve(points: list[Tensor]) -> Curve:
    if not points:
        return Curve([], [])
    loss, spread = torch.stack(points).double().cpu().unbind(1)
    return Curve(loss.tolist(), (loss / spread).tolist())


def _casting(model: PreTrainedModel, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)
