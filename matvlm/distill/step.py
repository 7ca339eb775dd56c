"""The losses of some micro-batches, each for one backward pass, and what the teacher does for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matvlm.config import Loss, Recipe
from matvlm.data.encoding import Batch
from matvlm.distill.feed import Group
from matvlm.distill.graphs import Graphs, rounded
from matvlm.distill.modules import recomputing
from matvlm.distill.objective import Cached, Divisors, Online, TeacherSide, logit_losses
from matvlm.distill.speed import Speed
from matvlm.distill.trunk import SharedTrunk, StudentForced, TeacherForced
from matvlm.models import hybrid
from matvlm.models.families import BIDIRECTIONAL
from matvlm.models.packing import unpacked
from matvlm.models.patch import forward_as
from matvlm.models.watch import Seen
from matvlm.targets import TargetReader
from matvlm.teacher import LastHidden, kept_hidden


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
        self.decoder: Any = trunk.student.get_decoder()
        self.graphs = Graphs(self.decoder, device) if recipe.distill.cuda_graphs else None

    def passes(self, group: Group, divisors: Divisors, settings: Loss, repeats: int = 0) -> Iterator[Pass]:
        """Those of one group; the loss of each has to go backward before the next is asked for.

        The teacher-forced layer loss comes first and by itself, so its gradient need not wait for another's. Then one
        pass for each micro-batch, and ``repeats`` more of the last.
        """
        whole = self._there(group.whole)
        with self._running():
            vision = self.trunk.look(whole)
        with self._running(), vision.shared():
            hidden, seen = self._run_teacher(whole, settings)
            if teacher_forces(settings):
                loss = TeacherForced(self.trunk, whole, settings.layer_form, seen).value()
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
            with self._running(), vision.shared():
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
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        form = settings.layer_form if student_forces(settings) else None
        replays = self.graphs and torch.is_grad_enabled()  # a graph has its backward pass with it
        hidden, *sums = self._replayed(part, form) if replays else self._run(part, form)
        for value in sums:
            losses.append(settings.layer * value / divisors.tokens)
            terms["loss_layer"] = losses[0].detach()
        if teacher or settings.ce:
            loss, more = logit_losses(settings, self.trunk.student, hidden, part.kept_labels, teacher, divisors)
            losses.append(loss)
            terms |= more
        self.speed.mark("student")
        return Pass(part.ids, torch.stack(losses).sum(), terms)

    def _run(self, part: Batch, form: str | None) -> tuple[Tensor, ...]:
        """The student's last hidden states at the kept positions, [P, H]; with a ``form`` also the sum of the
        student-forced layer loss.
        """
        return self._compared(lambda: kept_hidden(self.trunk.student, part), part.real, form)

    def _compared(self, run: Callable[[], Tensor], real: Tensor, form: str | None) -> tuple[Tensor, ...]:
        layer_loss = StudentForced(self.trunk, real, form) if form else None
        with self._recomputing(), layer_loss or nullcontext():
            hidden = run()
        return (hidden, layer_loss.value()) if layer_loss else (hidden,)

    def _replayed(self, part: Batch, form: str | None) -> tuple[Tensor, ...]:
        """As ``_run``, with a graph for all that the decoder does."""
        forward, embed = self.decoder.forward, self.decoder.get_input_embeddings()
        sums: list[Tensor] = []

        def decode(embeddings: Tensor, real: Tensor) -> tuple[Tensor, ...]:
            run = partial(forward, inputs_embeds=embeddings, use_cache=False)
            return self._compared(lambda: run().last_hidden_state, real, form)

        def replay(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **more: Any) -> LastHidden:
            given = sorted(name for name, value in more.items() if isinstance(value, Tensor | dict))
            if given:
                raise ValueError(
                    f"distill.cuda_graphs: a {self.trunk.student.config.model_type} model's decoder is given "
                    f"{', '.join(given)} beside embeddings, which no graph knows: set it to false"
                )
            embeddings = embed(input_ids) if inputs_embeds is None else inputs_embeds
            assert self.graphs is not None
            hidden, *sums[:] = self.graphs.call(form, decode, rounded(embeddings), rounded(part.real))
            return LastHidden(hidden[:, : embeddings.shape[1]])

        with forward_as(self.decoder, replay):
            hidden = kept_hidden(self.trunk.student, part)
        return (hidden, *sums)

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

    @contextmanager
    def _running(self) -> Iterator[None]:
        device = self.device.partition(":")[0]
        # Nothing is used twice, so there is nothing to remember; and no graph may use what is remembered outside of it.
        cast = torch.autocast(device, torch.bfloat16, cache_enabled=False) if self.autocast else nullcontext()
        with cast, nullcontext() if self.recipe.distill.packing else unpacked():
            yield
