"""One distillation run while it lasts: the models, the engine, and what a single update does with them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import encode_rows
from matvlm.distill.engine import make_engine
from matvlm.distill.schedule import learning_rate, order
from matvlm.distill.trunk import SharedTrunk
from matvlm.losses import cross_entropy_sum, sparse_kl
from matvlm.models import hybrid, locate
from matvlm.targets import TargetReader
from matvlm.teacher import kept_logits


class DistillError(RuntimeError):
    """Distillation cannot go on; the message says at which update and why."""


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
        self.encoder = Encoder(processor, recipe.data.max_length)
        self.trunk = SharedTrunk(student, teacher)
        for mixer in hybrid.mixers(student).values():
            mixer.kernels = recipe.hybrid.kernels
        trained = hybrid.trained_parameters(student, recipe.distill.train_connector)
        for parameter in trained.values():
            parameter.data = parameter.data.float()
        self.trained_parameters = sum(parameter.numel() for parameter in trained.values())
        self.engine = make_engine(trained, recipe.distill, device)
        self.speed = Speed(device)

    def update(self, update: int, total: int) -> dict[str, float]:
        """One optimiser update; returns its losses, learning rate and gradient norm.

        Raises:
            DistillError: a loss or the gradient is not finite.
        """
        settings = self.recipe.distill
        rows = order(len(self.dataset), settings.batch_size, self.recipe.seed, update)
        batches = list(self._micro_batches(rows))
        kept = sum(int(batch.kept.sum()) for batch in batches)
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
        sums = {"loss": 0.0}
        for number, batch in enumerate(batches, start=1):
            terms = self._losses(batch, kept, tokens)
            loss = torch.stack(list(terms.values())).sum()
            _check_finite("the loss", float(loss.detach()), update, batch.ids)
            self.engine.backward(loss, last=number == len(batches))
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        lr = learning_rate(settings.optimizer.lr, settings.schedule, update, total)
        norm = self.engine.step(lr)
        _check_finite("the gradient norm", norm, update, [id for batch in batches for id in batch.ids])
        self.speed.add(len(rows), tokens)
        return {**sums, "lr": lr, "grad_norm": norm}

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[Batch]:
        size = self.recipe.distill.micro_batch_size
        for start in range(0, len(rows), size):
            chosen = (self.dataset[row] for row in rows[start : start + size])
            yield encode_rows(self.encoder, chosen).to(self.device)

    def _losses(self, batch: Batch, kept: int, tokens: int) -> dict[str, Tensor]:
        """The weighted loss terms of a micro-batch, each divided by its count over the whole batch.

        ``loss_prob`` and ``loss_ce`` are per kept position, ``loss_layer`` per real token.
        """
        settings = self.recipe.distill.loss
        terms = {}
        layer_loss = self.trunk.layer_loss(batch, settings.layer_inputs) if settings.layer else None
        with self._autocast():
            if settings.prob or settings.ce or settings.layer_inputs == "student_forced":
                with layer_loss or nullcontext():
                    logits = kept_logits(self.student, batch)
            if settings.prob:
                token_ids, logprobs, tail = (values.to(self.device) for values in self.targets.lookup(batch.ids))
                divergence = sparse_kl(logits, token_ids, logprobs, tail, settings.temperature)
                terms["loss_prob"] = settings.prob * divergence / kept
            if settings.ce:
                labels = batch.labels[:, 1:][batch.kept[:, :-1]]
                terms["loss_ce"] = settings.ce * cross_entropy_sum(logits, labels) / kept
            if layer_loss:
                terms["loss_layer"] = settings.layer * layer_loss.value() / tokens
        return terms

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
        on_gpu = self.device.startswith("cuda")
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "memory_gb": memory / 1e9,
        }
        self._restart()
        return rates

    def _restart(self) -> None:
        self.started, self.samples, self.tokens = time.monotonic(), 0, 0


def _check_finite(what: str, value: float, update: int, ids: Sequence[str]) -> None:
    if not math.isfinite(value):
        raise DistillError(
            f"update {update}: {what} is {value} on samples {', '.join(ids)}; lower distill.optimizer.lr, or look at "
            "these samples"
        )
