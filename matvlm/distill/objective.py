"""The losses that are taken on logits: each by its weight and divisor, and never for many positions at once.

The logits of P positions in float32 are the largest tensor of a distillation step, and a loss makes several of that
size. So head, losses and their gradient with respect to the hidden states are computed for ``CHUNK`` positions at a
time; what stays of a chunk is its gradient [CHUNK, H]. Nothing is computed twice, as the head is frozen.

Shapes: P kept positions, V vocabulary, H hidden size, k kept tokens of a target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm import losses
from matvlm.config import Loss
from matvlm.data.encoding import IGNORE, Batch
from matvlm.distill.known import known
from matvlm.teacher import head

CHUNK = 256
"""Positions whose logits exist together: of V = 51,200 in float32 that is 0.05 GB a tensor, where P = 2,048 positions
at once take 0.42 GB, of which a loss and its backward pass make several."""

SPARSE: Mapping[str, Callable[..., Tensor]] = {
    "kl": losses.sparse_kl,
    "reverse_kl": losses.sparse_reverse_kl,
    "jsd": losses.sparse_jsd,
}
DENSE: Mapping[str, Callable[..., Tensor]] = {
    "kl": losses.dense_kl,
    "reverse_kl": losses.dense_reverse_kl,
    "jsd": losses.dense_jsd,
}

Sums = dict[str, Tensor]
"""Losses by name, each the sum over some positions."""


class Counts(NamedTuple):
    """What there is in some micro-batches."""

    samples: int = 0
    positions: int = 0
    labels: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Counts:
        return cls(
            samples=sum(len(batch.ids) for batch in batches),
            positions=sum(int(batch.kept.sum()) for batch in batches),
            labels=sum(int((batch.kept_labels != IGNORE).sum()) for batch in batches),
            tokens=sum(int(batch.real.sum()) for batch in batches),
        )


@dataclass(frozen=True)
class Divisors:
    """What the sums of an update are divided by; counted over its whole batch, so micro-batches do not matter."""

    positions: int
    """For what is compared with the teacher's logits."""
    labels: int
    tokens: int
    """For the layer loss: real tokens, prompt and image included."""

    @classmethod
    def of(cls, counts: Sequence[Counts], scaling: str) -> Divisors:
        """Those of all micro-batches and processes together, or thrice the samples where ``scaling`` is ``paper``."""
        if scaling == "paper":
            return cls(*[sum(count.samples for count in counts)] * 3)
        return cls(
            positions=sum(count.positions for count in counts),
            labels=sum(count.labels for count in counts),
            tokens=sum(count.tokens for count in counts),
        )


class TeacherSide(Protocol):
    """What the student's logits of the positions ``part`` are compared with."""

    def compare(self, settings: Loss, logits: Tensor, part: slice) -> Sums: ...


class Cached:
    """What a target store keeps: ``token_ids`` int64 [P, k], ``logprobs`` [P, k] and ``tail`` [P].

    ``drawn`` int64 [P, S] are draws from the tail, where the store has them; the KL alone can be estimated from those.
    """

    def __init__(self, token_ids: Tensor, logprobs: Tensor, tail: Tensor, drawn: Tensor | None = None):
        self.token_ids, self.logprobs, self.tail, self.drawn = token_ids, logprobs, tail, drawn

    def compare(self, settings: Loss, logits: Tensor, part: slice) -> Sums:
        token_ids, logprobs, tail = self.token_ids[part], self.logprobs[part], self.tail[part]
        sums = {}
        if settings.prob and self.drawn is not None:
            drawn = self.drawn[part]
            sums["loss_prob"] = losses.sampled_kl(logits, token_ids, logprobs, drawn, tail, settings.temperature)
        elif settings.prob:
            divergence = SPARSE[settings.divergence]
            sums["loss_prob"] = divergence(logits, token_ids, logprobs, tail, settings.temperature)
        if settings.ce_teacher:
            sums["loss_ce_teacher"] = losses.sparse_teacher_ce(logits, token_ids, logprobs)
        return sums


class Online:
    """The teacher's own logits, made chunk by chunk from its last hidden states [P, H]; ``model`` has its head."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor):
        self.model, self.hidden = model, hidden

    def compare(self, settings: Loss, logits: Tensor, part: slice) -> Sums:
        with torch.no_grad():
            expected = head(self.model, self.hidden[part])
        sums = {}
        if settings.prob:
            sums["loss_prob"] = DENSE[settings.divergence](expected, logits, settings.temperature)
        if settings.ce_teacher:
            sums["loss_ce_teacher"] = losses.dense_teacher_ce(expected, logits)
        if settings.logits_l2:
            sums["loss_logits_l2"] = losses.logits_l2(expected, logits)
        return sums


def logit_losses(
    settings: Loss,
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    teacher: TeacherSide | None,
    divisors: Divisors,
    chunk: int = CHUNK,
) -> tuple[Tensor, Sums]:
    """All losses on the logits of ``hidden``, weighted and divided.

    Args:
        model: whose head is applied.
        hidden: the student's last hidden states, [P, H].
        labels: int64 [P], ``Batch.kept_labels``.
        teacher: None where no loss needs it.
        chunk: positions at a time.

    Returns:
        Their sum, a scalar with the gradient for ``hidden``, and each of them without gradient.
    """
    factors = {
        "loss_prob": settings.prob / divisors.positions,
        "loss_ce_teacher": settings.ce_teacher / divisors.positions,
        "loss_logits_l2": settings.logits_l2 / divisors.positions,
        "loss_ce": settings.ce / divisors.labels,
    }

    def terms(logits: Tensor, part: slice) -> Sums:
        sums = teacher.compare(settings, logits, part) if teacher else {}
        if settings.ce:
            sums["loss_ce"] = losses.cross_entropy_sum(logits, labels[part])
        return {name: factors[name] * value for name, value in sums.items()}

    return _in_chunks(model, hidden, terms, chunk)


def _in_chunks(
    model: PreTrainedModel, hidden: Tensor, terms: Callable[[Tensor, slice], Sums], chunk: int
) -> tuple[Tensor, Sums]:
    """The sum of ``terms(logits, part)`` over the positions' parts, with its gradient for ``hidden``, and each term."""
    trains = torch.is_grad_enabled() and hidden.requires_grad
    gradient = torch.empty_like(hidden) if trains else None
    total = torch.zeros((), device=hidden.device)
    sums: Sums = {}
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        piece = hidden[part].detach().requires_grad_(trains)
        found = terms(head(model, piece), part)
        loss = torch.stack(list(found.values())).sum()
        if gradient is not None:
            gradient[part] = torch.autograd.grad(loss, piece)[0]
        total = total + loss.detach()
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    return (total if gradient is None else known(total, [hidden], [gradient])), sums
