"""The distillation loop: data order, losses, updates, snapshots.

Everything an update does is a function of the recipe and of the update's number: the samples (``order``), the learning
rate (``learning_rate``), the losses divided by counts over the whole batch. Nothing is drawn at random, so a run that
continues from a snapshot repeats exactly what an uninterrupted one would have done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Distill, Recipe, Schedule
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import open_dataset, turns_of
from matvlm.distill.engine import make_engine
from matvlm.distill.trunk import SharedTrunk
from matvlm.init import convert_
from matvlm.losses import cross_entropy_sum, sparse_kl
from matvlm.models import hybrid, locate
from matvlm.models.layers import choose_layers
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.snapshots import Snapshots
from matvlm.storage import read_json, write_json
from matvlm.targets import TargetReader, open_targets
from matvlm.teacher import kept_logits

MODEL, RESULT = "model", "checkpoint.json"


class DistillError(RuntimeError):
    """Distillation cannot go on; the message says at which update and why."""


def init_student(recipe: Recipe, teacher: Checkpoint, init: str, folder: Path) -> Checkpoint:
    """Replace attention by Mamba-2 in a copy of ``teacher`` and save the untrained hybrid to ``folder``.

    Raises:
        ValueError: the layers cannot be chosen or replaced (see ``choose_layers``, ``convert_``).
    """
    settings = recipe.hybrid
    model, processor = locate.load(teacher.uri, dtype=getattr(torch, recipe.teacher.dtype))
    layers = choose_layers(len(hybrid.decoder_layers(model)), settings.ratio, settings.layers)
    convert_(model, layers, init, recipe.seed, settings.chunk_size, settings.kernels)
    hybrid.save(model, processor, folder, {"teacher": teacher.uri, "seed": recipe.seed})
    return Checkpoint(
        uri=str(folder),
        label="student",
        init=init,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def distill(
    recipe: Recipe,
    student: Checkpoint,
    teacher: Checkpoint,
    data: DataManifest,
    targets: TargetStore,
    folder: Path,
    reporter: Reporter,
    device: str,
) -> Checkpoint:
    """Train the mixers and the connector of ``student`` and save it to ``folder/model``.

    Continues from the newest intact snapshot in ``folder/snapshots``; a finished run there is returned as it is.

    Raises:
        SnapshotError: the snapshots there were made with another recipe, data or student.
        TargetError: the target store is damaged or lacks a sample.
        DistillError: a loss is not finite.
        StorageError: a snapshot or the model cannot be written.
    """
    if (folder / RESULT).exists():
        return Checkpoint.model_validate(read_json(folder / RESULT))
    run = _Run.open(recipe, student, teacher, data, targets, folder, device)
    total = num_updates(recipe.distill, len(run.dataset))
    done = run.restore()
    with Progress(total, f"distill {student.init}", "update", reporter, initial=done) as progress:
        for update in range(done + 1, total + 1):
            values = run.update(update, total)
            progress.update(1, loss=values["loss"])
            if update % recipe.distill.log_every_updates == 0 or update == total:
                run.history.append({"update": update, **values})
                reporter.metrics(values | run.speed(), update)
            if update % recipe.distill.checkpoint_every_updates == 0 and update < total:
                run.snapshots.save(update, {"engine": run.engine.state(), "history": run.history})
    return _finish(run, student, teacher, folder, reporter, total)


def num_updates(settings: Distill, num_samples: int) -> int:
    """Optimiser updates of the whole run; the last batch of an epoch may be smaller."""
    updates = settings.epochs * math.ceil(num_samples / settings.batch_size)
    return min(updates, settings.max_updates or updates)


def order(num_samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """The data set rows of ``update`` (from 1): a permutation per epoch, a function of (seed, epoch) alone."""
    per_epoch = math.ceil(num_samples / batch_size)
    epoch, position = divmod(update - 1, per_epoch)
    permutation = np.random.default_rng((seed, epoch)).permutation(num_samples)
    rows: list[int] = permutation[position * batch_size : (position + 1) * batch_size].tolist()
    return rows


def learning_rate(peak: float, schedule: Schedule, update: int, total: int) -> float:
    """Warmup-stable-decay at ``update`` (from 1): linear up, constant, linear down to ``final_lr_share`` of the peak."""
    up = min(1.0, update / schedule.warmup_updates) if schedule.warmup_updates else 1.0
    left = (total - update) / schedule.decay_updates if schedule.decay_updates else 1.0
    down = schedule.final_lr_share + (1.0 - schedule.final_lr_share) * min(1.0, left)
    return peak * min(up, down)


@dataclass
class _Run:
    """What one distillation run holds open."""

    recipe: Recipe
    device: str
    trunk: SharedTrunk
    processor: Any
    encoder: Encoder
    dataset: Any
    targets: TargetReader
    engine: Any
    snapshots: Snapshots
    trained_parameters: int
    history: list[dict[str, float]] = field(default_factory=list)
    clock: list[float] = field(default_factory=lambda: [time.monotonic(), 0.0, 0.0])
    """When the last speed was reported, and the samples and tokens since then."""

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        student: Checkpoint,
        teacher: Checkpoint,
        data: DataManifest,
        targets: TargetStore,
        folder: Path,
        device: str,
    ) -> _Run:
        dtype = getattr(torch, recipe.teacher.dtype)
        model, processor = locate.load(student.uri, device, dtype)
        original, _ = locate.load(teacher.uri, device, dtype)
        trunk = SharedTrunk(model, original)
        parameters = hybrid.trained_parameters(model, recipe.distill.train_connector)
        identity = {
            "distill": recipe.distill.model_dump(mode="json", exclude=set(_FREE_TO_CHANGE)),
            "seed": recipe.seed,
            "init": student.init,
            "layers": student.layers,
            "data": data.fingerprint,
            "targets": targets.identity,
        }
        for mixer in hybrid.mixers(model).values():
            mixer.kernels = recipe.hybrid.kernels
        return cls(
            recipe=recipe,
            device=device,
            trunk=trunk,
            processor=processor,
            encoder=Encoder(processor, recipe.data.max_length),
            dataset=open_dataset(data),
            targets=open_targets(targets.uri),
            engine=make_engine(model, parameters, recipe.distill, device),
            snapshots=Snapshots(folder / "snapshots", identity, recipe.distill.keep_checkpoints),
            trained_parameters=sum(parameter.numel() for parameter in parameters.values()),
        )

    @property
    def student(self) -> PreTrainedModel:
        return self.trunk.student

    def restore(self) -> int:
        """Load the newest snapshot; the number of updates behind it."""
        latest = self.snapshots.latest()
        if latest is None:
            return 0
        update, state = latest
        self.engine.load_state(state["engine"])
        self.history = state["history"]
        return update

    def update(self, update: int, total: int) -> dict[str, float]:
        """One optimiser update; returns its losses, learning rate and gradient norm."""
        settings = self.recipe.distill
        rows = order(len(self.dataset), settings.batch_size, self.recipe.seed, update)
        batches = list(self._micro_batches(rows))
        kept = sum(int(batch.kept.sum()) for batch in batches)
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in batches)
        sums = {"loss": 0.0}
        for number, batch in enumerate(batches, start=1):
            terms = self._losses(batch, kept, tokens)
            loss = torch.stack(list(terms.values())).sum()
            self._check_finite(loss, update, batch)
            self.engine.backward(loss, last=number == len(batches))
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        lr = learning_rate(settings.optimizer.lr, settings.schedule, update, total)
        norm = self.engine.step(lr)
        self.clock[1] += len(rows)
        self.clock[2] += tokens
        return {**sums, "lr": lr, "grad_norm": norm}

    def speed(self) -> dict[str, float]:
        """Rates since the last call, and the memory in use (GPU peak, or the process's resident memory), in GB."""
        started, samples, tokens = self.clock
        now = time.monotonic()
        self.clock = [now, 0.0, 0.0]
        on_gpu = self.device.startswith("cuda")
        memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        seconds = now - started
        return {
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "memory_gb": memory / 1e9,
        }

    def _micro_batches(self, rows: Sequence[int]) -> Iterator[Batch]:
        size = self.recipe.distill.micro_batch_size
        for start in range(0, len(rows), size):
            chosen = [self.dataset[row] for row in rows[start : start + size]]
            samples = [self.encoder.encode(row["id"], row["image"], turns_of(row)) for row in chosen]
            yield self.encoder.collate(samples).to(self.device)

    def _losses(self, batch: Batch, kept: int, tokens: int) -> dict[str, Tensor]:
        """The weighted loss terms of a micro-batch, each divided by its count over the whole batch.

        ``loss_prob`` and ``loss_ce`` are per kept position, ``loss_layer`` per real token.
        """
        settings = self.recipe.distill.loss
        terms = {}
        wanted: AbstractContextManager[Any] = nullcontext()
        if settings.layer:
            wanted = self.trunk.layer_loss(batch, settings.layer_inputs)
        with self._autocast():
            if settings.prob or settings.ce or settings.layer_inputs == "student_forced":
                with wanted:
                    logits = kept_logits(self.student, batch)
            if settings.prob:
                expected = (values.to(self.device) for values in self.targets.lookup(batch.ids))
                terms["loss_prob"] = settings.prob * sparse_kl(logits, *expected, settings.temperature) / kept
            if settings.ce:
                labels = batch.labels[:, 1:][batch.kept[:, :-1]]
                terms["loss_ce"] = settings.ce * cross_entropy_sum(logits, labels) / kept
            if settings.layer:
                terms["loss_layer"] = settings.layer * wanted.value() / tokens
        return terms

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.recipe.distill.autocast == "off":
            return nullcontext()
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16)

    def _check_finite(self, loss: Tensor, update: int, batch: Batch) -> None:
        if not bool(torch.isfinite(loss)):
            raise DistillError(
                f"update {update}: the loss is {float(loss)} on samples {', '.join(batch.ids)}; lower "
                "distill.optimizer.lr, or look at these samples"
            )


_FREE_TO_CHANGE = ("checkpoint_every_updates", "keep_checkpoints", "log_every_updates", "engine", "deepspeed")
"""Fields of ``recipe.distill`` that do not change what is computed."""


def _finish(
    run: _Run, student: Checkpoint, teacher: Checkpoint, folder: Path, reporter: Reporter, total: int
) -> Checkpoint:
    from matvlm.plots import loss_curves

    provenance = {"teacher": teacher.uri, "recipe": run.recipe.model_dump(mode="json"), "updates": total}
    hybrid.save(run.student, run.processor, folder / MODEL, provenance)
    loss_curves(run.history, folder / "loss_curves.png")
    reporter.artifact(folder / "loss_curves.png", "plots")
    result = student.model_copy(
        update={"uri": str(folder / MODEL), "updates": total, "trained_parameters": run.trained_parameters}
    )
    write_json(folder / RESULT, result.model_dump(mode="json"))
    return result
