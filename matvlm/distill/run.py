"""One distillation run while it lasts: the models, the engine, and what a single update does with them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import encode_rows
from matvlm.distill.engine import make_engine
from matvlm.distill.failures import Skipped, memory_explained, memory_in_use
from matvlm.distill.objective import Cached, Divisors, Online, TeacherSide, logit_losses
from matvlm.distill.schedule import learning_rate, order
from matvlm.distill.trunk import LayerLoss, SharedTrunk
from matvlm.models import hybrid, locate
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
    """What a run holds open: the student with the teacher in it, the data, the targets, the engine that trains."""

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        processor: Any,
        dataset: Any,
        targets: TargetReader,
    ):
        """The trained parameters of ``student`` become float32, so that small updates are not rounded away.

        Raises:
            ValueError: ``student`` was not made from ``teacher``, or the recipe's engine is not installed.
        """
        self.recipe, self.device, self.student = recipe, device, student
        self.dataset, self.targets = dataset, targets
        self.encoder = Encoder(processor, recipe.data.max_length, recipe.targets.positions)
        self.trunk = SharedTrunk(student, teacher)
        for mixer in hybrid.mixers(student).values():
            mixer.kernels = recipe.hybrid.kernels
        trained = hybrid.trained_parameters(student, recipe.distill.train_connector)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.trained_parameters = sum(parameter.numel() for parameter in trained.values())
        self.engine = make_engine(trained, recipe.distill, device)
        self.skipped = Skipped(recipe.distill.max_skipped_updates)
        self.speed = Speed(device)

    def update(self, update: int, total: int) -> dict[str, float]:
        """One optimiser update; returns its losses, learning rate, gradient norm and how many were skipped so far.

        An update whose loss or gradient is not finite is skipped: it trains nothing and has neither losses nor norm.

        Raises:
            DistillError: too many updates were skipped, or the memory does not suffice.
        """
        with memory_explained(self.recipe, self.device, update):
            return self._update(update, total)

    def _update(self, update: int, total: int) -> dict[str, float]:
        settings = self.recipe.distill
        rows = order(len(self.dataset), settings.batch_size, self.recipe.seed, update)
        batches = list(self._micro_batches(rows))
        divisors = Divisors.of(batches, settings.loss.scaling)
        tokens = sum(int(batch.real.sum()) for batch in batches)
        sums = {"loss": 0.0}
        broken: list[str] = []
        for number, batch in enumerate(batches, start=1):
            loss, terms = self._losses(batch, divisors)
            if not math.isfinite(float(loss.detach())):
                broken += batch.ids
                loss = loss * math.nan  # an infinite loss may have a finite gradient; now the engine's norm tells all
            self.engine.backward(loss, last=number == len(batches))
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        lr = learning_rate(settings.optimizer.lr, settings.schedule, update, total)
        norm = self.engine.step(lr)
        self.speed.add(len(rows), tokens)
        made = {**sums, "grad_norm": norm}
        if not math.isfinite(norm):
            what = "the loss is not finite" if broken else f"the gradient norm is {norm}"
            self.skipped.add(update, total, what, broken or [id for batch in batches for id in batch.ids])
            made = {}
        return {**made, "lr": lr, "skipped_updates": float(len(self.skipped.updates))}

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[Batch]:
        size = self.recipe.distill.micro_batch_size
        for start in range(0, len(rows), size):
            chosen = (self.dataset[row] for row in rows[start : start + size])
            yield encode_rows(self.encoder, chosen).to(self.device)

    def _losses(self, batch: Batch, divisors: Divisors) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of a micro-batch, divided by counts over the whole batch; and its terms, no gradient."""
        settings = self.recipe.distill.loss
        compared = bool(settings.prob or settings.ce_teacher or settings.logits_l2)
        parts: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        with self._autocast(), self.trunk.shared_vision():
            layer_loss, teacher = self._teacher_side(batch, compared)
            if compared or settings.ce or settings.layer_inputs == "student_forced":
                with layer_loss or nullcontext():
                    hidden = kept_hidden(self.student, batch)
            if compared or settings.ce:
                loss, terms = logit_losses(settings, self.student, hidden, batch.kept_labels, teacher, divisors)
                parts.append(loss)
            if layer_loss:
                parts.append(settings.layer * layer_loss.value() / divisors.tokens)
                terms["loss_layer"] = parts[-1].detach()
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
            drawn = self.targets.draws(batch.ids)
            token_ids, logprobs, tail = (values.to(self.device) for values in self.targets.lookup(batch.ids))
            teacher = Cached(token_ids, logprobs, tail, None if drawn is None else drawn.to(self.device))
        if not settings.layer:
            return None, teacher
        return self.trunk.layer_loss(batch, settings.layer_inputs, settings.layer_form, seen), teacher

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.distill.autocast == "off":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16)


class Speed:
    """Samples and tokens since the rates were last asked for."""

    def __init__(self, device: str):
        self.device = device
        self._restart()

    def add(self, samples: int, tokens: int) -> None:
        self.samples += samples
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Rates since the last call, and the memory in use (GPU peak, or the process's resident memory), in GB."""
        seconds = time.monotonic() - self.started
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "memory_gb": memory_in_use(self.device) / 1e9,
        }
        self._restart()
        return rates

    def _restart(self) -> None:
        self.started, self.samples, self.tokens = time.monotonic(), 0, 0
