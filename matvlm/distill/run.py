"""One distillation run while it lasts: the models, the engine, and what a single update does with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe
from matvlm.data.encoding import Batch
from matvlm.distill.engine import make_engine
from matvlm.distill.failures import Skipped, Unusable, memory_explained
from matvlm.distill.feed import Share
from matvlm.distill.modules import cast_, fuse_activations_, recomputing
from matvlm.distill.objective import Cached, Counts, Divisors, Online, TeacherSide, logit_losses
from matvlm.distill.schedule import learning_rate
from matvlm.distill.speed import Speed
from matvlm.distill.trunk import LayerLoss, SharedTrunk
from matvlm.distill.world import World
from matvlm.models import hybrid, locate
from matvlm.models.families import BIDIRECTIONAL
from matvlm.models.packing import check as check_packing
from matvlm.snapshots import cpu_copy
from matvlm.targets import TargetReader
from matvlm.teacher import kept_hidden


def open_models(
    recipe: Recipe, student: Checkpoint, teacher: Checkpoint, device: str
) -> tuple[PreTrainedModel, PreTrainedModel, Any]:
    """Student, teacher and the teacher's processor, with weights of ``recipe.teacher.dtype`` on ``device``."""
    dtype = getattr(torch, recipe.teacher.dtype)
    original, processor = locate.load(teacher.uri, device, dtype)
    model, _ = locate.load(student.uri, device, dtype)
    return model, original, processor


class Run:
    """What a run holds open: the student with the teacher in it, the targets, the engine that trains."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        targets: TargetReader | None,
        world: World | None = None,
        most_unusable: int = 0,
    ):
        """The trained parameters of ``student`` become float32, so that small updates are not rounded away.

        Args:
            targets: may be None where the recipe's losses read no store.
            most_unusable: samples that may be missing from updates because they could not be loaded.

        Raises:
            ValueError: ``student`` was not made from ``teacher``, cannot be trained on packed samples though the
                recipe asks for it, or the recipe's engine is not installed.
        """
        self.recipe, self.device, self.student = recipe, device, student
        self.targets, self.world = targets, world or World()
        self.trunk = SharedTrunk(student, teacher)
        if recipe.distill.packing:
            check_packing(student)
        self.causal = student.config.model_type not in BIDIRECTIONAL
        fuse_activations_(student)
        for mixer in hybrid.mixers(student).values():
            mixer.kernels = recipe.hybrid.kernels
        trained = hybrid.trained_parameters(student, recipe.distill.train_connector)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.half = recipe.distill.autocast != "off"
        if self.half and recipe.teacher.dtype != "float32":
            connector = hybrid.find_connector(student) if recipe.distill.train_connector else None
            cast_([*hybrid.mixers(student).values(), *([connector] if connector else [])], device, torch.bfloat16)
            self.half = False  # all else is of half precision itself
        if recipe.distill.compile:
            self.trunk.compile()
        self.trained_parameters = sum(parameter.numel() for parameter in trained.values())
        self.engine = make_engine(trained, recipe.distill, device, self.world)
        self.skipped = Skipped(recipe.distill.max_skipped_updates)
        self.unusable = Unusable(most_unusable)
        self.speed = Speed(device)

    def update(self, update: int, total: int, share: Share) -> dict[str, float]:
        """One optimiser update; returns its losses, learning rate, gradient norm and how many were skipped so far.

        An update whose loss or gradient is not finite is skipped: it trains nothing and has neither losses nor norm.
        Every process gets the same values.

        Raises:
            DistillError: too many updates were skipped, or the memory does not suffice.
        """
        with memory_explained(self.recipe, self.device, update):
            return self._update(update, total, share)

    def state(self) -> dict[str, Any]:
        """All that an update depends on but the recipe and its number, on the CPU; all processes have to call it."""
        lost = {"skipped": self.skipped.updates, "unusable": self.unusable.samples}
        return {"engine": self.engine.state(), **cpu_copy(lost)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state`` was, of a run with any number of processes."""
        self.engine.load_state(state["engine"])
        self.skipped.updates, self.unusable.samples = dict(state["skipped"]), dict(state["unusable"])

    def _update(self, update: int, total: int, share: Share) -> dict[str, float]:
        settings = self.recipe.distill
        own = Counts.of(share.batches[: share.counted])
        everyone = self.world.gather((len(share.batches), own, share.bad))
        counts = [count for _, count, _ in everyone]
        divisors = Divisors.of(counts, settings.loss.scaling)
        steps = max(number for number, _, _ in everyone)
        self.unusable.add(update, {id: why for _, _, bad in everyone for id, why in bad.items()})
        self.speed.mark("data")
        found: list[dict[str, Tensor]] = []
        for number in range(steps):
            batch = share.batches[min(number, len(share.batches) - 1)]
            loss, terms = self._losses(batch.to(self.device), divisors)
            # An infinite loss may have a finite gradient; with this factor the engine's norm tells all.
            soundness = 1.0 + (loss.detach() - loss.detach())
            weight = 1.0 if number < share.counted else 0.0
            self.engine.backward(loss * soundness * weight, last=number == steps - 1)
            if weight:
                found.append({"loss": loss.detach(), **terms})
            self.speed.mark("backward")
        lr = learning_rate(settings.optimizer.lr, settings.schedule, update, total)
        norm = self.engine.step(lr)
        sums, broken = self._read(found, share)
        self.speed.mark("optimizer")
        self.speed.add(sum(count.samples for count in counts), sum(count.tokens for count in counts))
        made = {**sums, "grad_norm": norm}
        if not math.isfinite(norm):
            what = "the loss is not finite" if broken else f"the gradient norm is {norm}"
            everything = self.world.gather([id for batch in share.batches[: share.counted] for id in batch.ids])
            self.skipped.add(update, total, what, broken or [id for ids in everything for id in ids])
            made = {}
        lost = {"skipped_updates": len(self.skipped.updates), "unusable_samples": len(self.unusable.samples)}
        return {**made, "lr": lr, **{name: float(count) for name, count in lost.items()}}

    def _read(self, found: list[dict[str, Tensor]], share: Share) -> tuple[dict[str, float], list[str]]:
        """The update's losses by name, and the ids of micro-batches whose loss is not finite; of all processes."""
        names = list(found[0]) if found else []
        rows = torch.stack([torch.stack([terms[name] for name in names]) for terms in found]).tolist() if found else []
        broken = [
            id for row, batch in zip(rows, share.batches, strict=False) if not math.isfinite(row[0]) for id in batch.ids
        ]
        sums = {name: sum(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        everyone = self.world.gather((sums, broken))
        total: dict[str, float] = {}
        for theirs, _ in everyone:
            for name, value in theirs.items():
                total[name] = total.get(name, 0.0) + value
        return total, [id for _, ids in everyone for id in ids]

    def _losses(self, batch: Batch, divisors: Divisors) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch, divided by counts over the whole batch; and its terms, no gradient."""
        settings = self.recipe.distill.loss
        batch = batch.unmasked() if self.causal else batch
        compared = bool(settings.prob or settings.ce_teacher or settings.logits_l2)
        parts: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        with self._autocast(), self.trunk.shared_vision():
            layer_loss, teacher = self._teacher_side(batch, compared)
            if layer_loss and settings.layer_inputs == "teacher_forced":
                parts.append(settings.layer * layer_loss.value() / divisors.tokens)
            self.speed.mark("teacher")
            if compared or settings.ce or settings.layer_inputs == "student_forced":
                with self._recomputing(), layer_loss or nullcontext():
                    hidden = kept_hidden(self.student, batch)
            if layer_loss and settings.layer_inputs == "student_forced":
                parts.append(settings.layer * layer_loss.value() / divisors.tokens)
            if layer_loss:
                terms["loss_layer"] = parts[-1].detach()
            if compared or settings.ce:
                loss, logit_terms = logit_losses(settings, self.student, hidden, batch.kept_labels, teacher, divisors)
                parts.append(loss)
                terms |= logit_terms
            self.speed.mark("student")
        return torch.stack(parts).sum(), terms

    def _teacher_side(self, batch: Batch, compared: bool) -> tuple[LayerLoss | None, TeacherSide | None]:
        """The layer loss, and what logits are ``compared`` with. Online, one pass of the teacher serves both."""
        settings = self.recipe.distill.loss
        teacher: TeacherSide | None = None
        seen = None
        if compared and settings.targets == "online":
            watched = settings.layer > 0 and settings.layer_inputs == "teacher_forced"
            hidden, seen = self.trunk.run_teacher(batch, watched)
            teacher = Online(self.student, hidden)
        elif compared:
            assert self.targets is not None
            drawn = self.targets.draws(batch.ids)
            token_ids, logprobs, tail = (values.to(self.device) for values in self.targets.lookup(batch.ids))
            teacher = Cached(token_ids, logprobs, tail, None if drawn is None else drawn.to(self.device))
        if not settings.layer:
            return None, teacher
        return self.trunk.layer_loss(batch, settings.layer_inputs, settings.layer_form, seen), teacher

    def _recomputing(self) -> AbstractContextManager[Any]:
        choice = self.recipe.distill.activation_checkpointing
        if choice == "none":
            return nullcontext()
        layers: Any = hybrid.decoder_layers(self.student)
        return recomputing(hybrid.mixers(self.student).values() if choice == "mixers" else layers)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16) if self.half else nullcontext()
