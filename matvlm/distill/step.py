"""The losses of some micro-batches, each for one backward pass, and what the teacher does for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matvlm.config import Loss, Recipe
from matvlm.data.encoding import Batch
from matvlm.distill.feed import Group
from matvlm.distill.modules import recomputing
from matvlm.distill.objective import Cached, Divisors, Online, TeacherSide, logit_losses
from matvlm.distill.speed import Speed
from matvlm.distill.trunk import SharedTrunk
from matvlm.models import hybrid
from matvlm.models.families import BIDIRECTIONAL
from matvlm.models.watch import Seen
from matvlm.targets import TargetReader
from matvlm.teacher import kept_hidden


class Pass(NamedTuple):
    """``loss``, a scalar with gradient, of the samples ``ids``, and its ``terms`` without; weighted and divided."""

    ids: list[str]
    loss: Tensor
    terms: dict[str, Tensor]


def compares_logits(settings: Loss) -> bool:
    """Whether the student's logits are compared with the teacher's."""
    return bool(settings.prob or settings.ce_teacher or settings.logits_l2)


def runs_student(settings: Loss) -> bool:
    """Whether the whole student has to run, and not only its mixers on what the teacher's attentions saw."""
    return compares_logits(settings) or bool(settings.ce) or student_forces(settings)


def student_forces(settings: Loss) -> bool:
    """Whether mixers are compared with attentions on the student's own states."""
    return bool(settings.layer) and settings.layer_inputs == "student_forced"


def teacher_forces(settings: Loss) -> bool:
    """Whether mixers are fed what the teacher's attentions saw."""
    return bool(settings.layer) and settings.layer_inputs == "teacher_forced"


def count_passes(parts: Sequence[int], settings: Loss) -> int:
    """Of ``Steps.passes`` over groups of so many micro-batches."""
    return sum(teacher_forces(settings) + runs_student(settings) * count for count in parts)


class Steps:
    """Makes the passes of groups of micro-batches.

    What needs no gradient through the model, that is the vision tower, the teacher and the mixers that are fed the
    teacher's states, is done for a whole group: it keeps little, and in small portions a GPU would wait for its host.
    """

    def __init__(self, recipe: Recipe, trunk: SharedTrunk, targets: TargetReader | None, device: str, speed: Speed):
        self.recipe, self.trunk, self.targets, self.device, self.speed = recipe, trunk, targets, device, speed
        self.causal = trunk.student.config.model_type not in BIDIRECTIONAL
        self.autocast = recipe.distill.autocast != "off" and recipe.teacher.dtype == "float32"

    def passes(self, group: Group, divisors: Divisors, settings: Loss, repeats: int = 0) -> Iterator[Pass]:
        """Those of one group; the loss of each has to go backward before the next is asked for.

        The teacher-forced layer loss comes first and by itself, so its gradient need not wait for another's. Then one
        pass for each micro-batch, and ``repeats`` more of the last.
        """
        whole = self._there(group.whole)
        with self._casting():
            vision = self.trunk.look(whole)
        with self._casting(), vision.shared():
            hidden, seen = self._run_teacher(whole, settings)
            if teacher_forces(settings):
                loss = self.trunk.layer_loss(whole, "teacher_forced", settings.layer_form, seen).value()
        del seen
        self.speed.mark("teacher")
        if teacher_forces(settings):
            loss = settings.layer * loss / divisors.tokens
            yield Pass(whole.ids, loss, {"loss_layer": loss.detach()})
            del loss
        if not runs_student(settings):
            return
        parts = [whole] if len(group.parts) == 1 else [self._there(part) for part in group.parts]
        taught = [None] * len(parts) if hidden is None else list(hidden.split([len(p.kept_places) for p in parts]))
        for number in range(len(parts) + repeats):
            part, states = parts[min(number, len(parts) - 1)], taught[min(number, len(parts) - 1)]
            with self._casting(), vision.shared():
                made = self._student(part, self._taught(part, states, settings), divisors, settings)
            if number == len(parts) + repeats - 1:
                vision.forget()  # what it knows has the size of its activations
            yield made

    def _run_teacher(self, whole: Batch, settings: Loss) -> tuple[Tensor | None, dict[int, Seen] | None]:
        """The whole teacher, where its logits are not read from a store; one pass serves the layer loss as well."""
        if settings.targets != "online" or not compares_logits(settings):
            return None, None
        return self.trunk.run_teacher(whole, watched=teacher_forces(settings))

    def _taught(self, part: Batch, hidden: Tensor | None, settings: Loss) -> TeacherSide | None:
        """What the student's logits are compared with."""
        if hidden is not None:
            return Online(self.trunk.student, hidden)
        if not compares_logits(settings):
            return None
        assert self.targets is not None
        drawn = self.targets.draws(part.ids)
        token_ids, logprobs, tail = (values.to(self.device) for values in self.targets.lookup(part.ids))
        return Cached(token_ids, logprobs, tail, None if drawn is None else drawn.to(self.device))

    def _student(self, part: Batch, teacher: TeacherSide | None, divisors: Divisors, settings: Loss) -> Pass:
        forced = student_forces(settings)
        layer_loss = self.trunk.layer_loss(part, "student_forced", settings.layer_form) if forced else None
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        with self._recomputing(), layer_loss or nullcontext():
            hidden = kept_hidden(self.trunk.student, part)
        if layer_loss:
            losses.append(settings.layer * layer_loss.value() / divisors.tokens)
            terms["loss_layer"] = losses[0].detach()
        if teacher or settings.ce:
            loss, more = logit_losses(settings, self.trunk.student, hidden, part.kept_labels, teacher, divisors)
            losses.append(loss)
            terms |= more
        self.speed.mark("student")
        return Pass(part.ids, torch.stack(losses).sum(), terms)

    def _there(self, batch: Batch) -> Batch:
        """``batch`` on the device; its mask stays here if the model does without."""
        return (batch.unmasked() if self.causal else batch).to(self.device)

    def _recomputing(self) -> AbstractContextManager[Any]:
        choice = self.recipe.distill.activation_checkpointing
        if choice == "none":
            return nullcontext()
        student = self.trunk.student
        layers: Any = hybrid.decoder_layers(student)
        return recomputing(hybrid.mixers(student).values() if choice == "mixers" else layers)

    def _casting(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.autocast else nullcontext()
