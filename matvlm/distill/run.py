"""One distillation run while it lasts: the models, the engine, and what a single update does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.config import Loss, Recipe
from matvlm.distill.deepspeed import shareable
from matvlm.distill.engine import make_engine
from matvlm.distill.failures import DistillError, Skipped, Unusable, memory_explained
from matvlm.distill.feed import Group, Share
from matvlm.distill.flops import flops_per_token
from matvlm.distill.modules import cast_
from matvlm.distill.objective import Counts, Divisors
from matvlm.distill.schedule import moment
from matvlm.distill.speed import Speed
from matvlm.distill.step import Pass, Steps, count_passes, teacher_forces
from matvlm.distill.trunk import SharedTrunk
from matvlm.models import hybrid, locate
from matvlm.models.fusing import fuse_activations_
from matvlm.models.packing import check as check_packing
from matvlm.snapshots import cpu_copy
from matvlm.targets import TargetReader
from matvlm.world import World


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
        self.world = world or World()
        self.trunk = SharedTrunk(student, teacher)
        if recipe.distill.packing:
            check_packing(student)
        fuse_activations_(student)
        for mixer in hybrid.mixers(student).values():
            mixer.kernels = recipe.hybrid.kernels
        trained = hybrid.trained_parameters(student, recipe.distill.train_connector)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        if recipe.distill.autocast != "off" and recipe.teacher.dtype != "float32":
            connector = hybrid.find_connector(student) if recipe.distill.train_connector else None
            cast_([*hybrid.mixers(student).values(), *([connector] if connector else [])], device, torch.bfloat16)
        if recipe.distill.compile:
            self.trunk.compile()
        self.trained_parameters = sum(parameter.numel() for parameter in trained.values())
        aligned = {id(parameter) for mixer in hybrid.mixers(student).values() for parameter in mixer.parameters()}
        rest = {name: value for name, value in trained.items() if id(value) not in aligned}
        self.unaligned = cpu_copy(rest) if recipe.distill.align.updates else {}
        self.engine = make_engine(trained, recipe.distill, device, self.world, shareable(self.trunk))
        self.skipped = Skipped(recipe.distill.max_skipped_updates)
        self.unusable = Unusable(most_unusable)
        self.speed = Speed(device, self.world.size)
        self.steps = Steps(recipe, self.trunk, targets, device, self.speed)

    def update(self, update: int, total: int, share: Share) -> dict[str, float]:
        """One optimiser update; returns its losses, learning rate, gradient norm and how many were skipped so far.

        An update whose loss or gradient is not finite is skipped: it trains nothing and has neither losses nor norm.
        Every process gets the same values.

        Raises:
            DistillError: too many updates were skipped, or the memory does not suffice.
        """
        with memory_explained(self.recipe, self.device, update):
            return self._update(update, total, share)

    @torch.no_grad()
    def validate(self, update: int, share: Share) -> dict[str, float]:
        """How far the student is from its teacher after ``update`` on ``share``, of samples that are not trained on.

        All processes have to call it.

        Returns:
            Whatever is trained: ``validation/loss_prob``, the mean of KL(teacher || student) over kept positions, in
            nats, as the target store has the teacher; and ``validation/loss_layer``, the paper's layer loss.

        Raises:
            DistillError: too many samples cannot be loaded, or the memory does not suffice.
        """
        with memory_explained(self.recipe, self.device, update):
            return self._validate(update, share)

    def _validate(self, update: int, share: Share) -> dict[str, float]:
        plan = self.recipe.distill.loss
        settings = Loss(layer_form=plan.layer_form, temperature=plan.temperature)
        counts, parts, bad = self._counted(share)
        self.unusable.add(update, bad)
        if not any(count.samples for count in counts):
            raise DistillError(
                f"no sample to validate on can be loaded (distill.validation): {'; '.join(bad.values())}"
            )
        divisors = Divisors.of(counts, settings.scaling)
        made = [made for made, weight in self._passes(share, parts, divisors, settings) if weight]
        sums, _ = self._read(made)
        self.speed.restart()
        return {f"validation/{name}": sums[name] for name in ("loss_prob", "loss_layer")}

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
        now = moment(settings, update, total)
        if settings.align.updates and update == settings.align.updates + 1:
            self._end_alignment()
            self.speed.flops_per_token = 0.0  # another stage, another count
        counts, parts, bad = self._counted(share)
        divisors = Divisors.of(counts, settings.loss.scaling)
        steps = count_passes(parts, now.loss)
        self.unusable.add(update, bad)
        if self.speed.peak and not self.speed.flops_per_token:
            self.speed.flops_per_token = flops_per_token(self.steps, share.groups[0], now.loss)
        self.speed.mark("data")
        found: list[Pass] = []
        for number, (made, weight) in enumerate(self._passes(share, parts, divisors, now.loss), start=1):
            # An infinite loss may have a finite gradient; with this factor the engine's norm tells all.
            soundness = 1.0 + (made.loss.detach() - made.loss.detach())
            self.engine.backward(made.loss * soundness * weight, last=number == steps)
            if weight:
                found.append(Pass(made.ids, made.loss.detach(), made.terms))
            self.speed.mark("backward")
        norm = self.engine.step(now.lr)
        sums, broken = self._read(found)
        self.speed.mark("optimizer")
        self.speed.add(sum(count.samples for count in counts), sum(count.tokens for count in counts))
        values = {**sums, "grad_norm": norm}
        if not math.isfinite(norm):
            what = "the loss is not finite" if broken else f"the gradient norm is {norm}"
            everything = self.world.gather([id for group in share.groups[: share.counted] for id in group.whole.ids])
            self.skipped.add(update, total, what, broken or [id for ids in everything for id in ids])
            values = {}
        lost = {"skipped_updates": len(self.skipped.updates), "unusable_samples": len(self.unusable.samples)}
        return {**values, "lr": now.lr, **now.logged, **{name: float(count) for name, count in lost.items()}}

    def _counted(self, share: Share) -> tuple[list[Counts], list[int], dict[str, str]]:
        """What each process has, the micro-batches of the longest group of each number, and the bad samples of all."""
        own = Counts.of([group.whole for group in share.groups[: share.counted]])
        everyone = self.world.gather(([len(group.parts) for group in share.groups], own, share.bad))
        parts = [max(several) for several in zip_longest(*[numbers for numbers, _, _ in everyone], fillvalue=0)]
        return [count for _, count, _ in everyone], parts, {k: why for *_, bad in everyone for k, why in bad.items()}

    def _passes(
        self, share: Share, parts: list[int], divisors: Divisors, settings: Loss
    ) -> Iterator[tuple[Pass, float]]:
        """The passes of groups of so many ``parts``, the same kinds in the same order in every process.

        Each with its weight: what only other processes have is made up for by passes that weigh nothing.
        """
        last = share.groups[-1].parts[-1]
        before = int(teacher_forces(settings))
        for number, most in enumerate(parts):
            group = share.groups[number] if number < len(share.groups) else Group(last, [last])
            counted = before + len(group.parts) if number < share.counted else 0
            passes = self.steps.passes(group, divisors, settings, repeats=most - len(group.parts))
            for index, made in enumerate(passes):
                yield made, 1.0 if index < counted else 0.0

    def _read(self, found: list[Pass]) -> tuple[dict[str, float], list[str]]:
        """The update's losses by name, and the ids of the passes whose loss is not finite; of all processes."""
        sums: dict[str, float] = {}
        broken: list[str] = []
        values = [value for made in found for value in (made.loss, *made.terms.values())]
        told = iter(torch.stack(values).tolist() if values else [])
        for made in found:
            row = {name: next(told) for name in ("loss", *made.terms)}
            broken += made.ids if not math.isfinite(row["loss"]) else []
            for name, value in row.items():
                sums[name] = sums.get(name, 0.0) + value
        everyone = self.world.gather((sums, broken))
        total: dict[str, float] = {}
        for theirs, _ in everyone:
            for name, value in theirs.items():
                total[name] = total.get(name, 0.0) + value
        return total, list(dict.fromkeys(id for _, ids in everyone for id in ids))

    def _end_alignment(self) -> None:
        """The end-to-end stage starts from the mixers that there are, the connector it was given and fresh moments.

        ZeRO decays the weights of a connector that has no gradient, hence the second.
        """
        state = self.engine.state()
        for name, entry in state.items():
            value = self.unaligned.get(name, entry["value"])
            state[name] = {key: torch.zeros_like(saved) for key, saved in entry.items()} | {"value": value}
        self.engine.load_state(state)
