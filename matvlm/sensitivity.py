"""Which layers can do with Mamba-2: measured, for ``hybrid.layers: sensitivity``.

Every layer gets a mixer; all of them are aligned together in one short pass over training data (``matvlm.alignment``).
Then one layer at a time is swapped in, all others still attention, and the divergence of this hybrid's answers from the
teacher's is measured on other samples. The layers with the smallest divergence are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from matvlm.alignment import Curve, align
from matvlm.artifacts import Artifact, Checkpoint, DataManifest
from matvlm.config import Recipe
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.held_out import split
from matvlm.data.prepare import encode_rows, open_dataset
from matvlm.init import CALIBRATED, INITS, calibrate
from matvlm.losses import dense_kl
from matvlm.models import locate
from matvlm.models.hybrid import decoder_layers
from matvlm.models.layers import least_sensitive
from matvlm.models.mixer import Mamba2Mixer
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.storage import read_json, write_json
from matvlm.teacher import kept_logits

REPORT = "sensitivity.json"
SETTLED_SHARE = 0.2
"""A layer's alignment error is the mean over this last share of the updates."""


Trial = TypeVar("Trial", bound=Hashable)


class SensitivityReport(Artifact):
    """What was measured, layer by layer, and which layers that chooses."""

    teacher: str
    init: str
    seed: int
    data: str
    """Fingerprint of the data set."""
    updates: int
    aligned_samples: int
    held_out_samples: int
    positions: int
    """Answer positions of the held-out samples."""
    kl: list[float]
    """KL(teacher || teacher with this layer alone replaced), in nats per answer position."""
    alignment_error: list[float]
    """Of the aligned mixer, relative to the variance of the attention's output: 0 is exact, 1 as good as its mean."""
    chosen: list[int]

    def table(self) -> str:
        """The layers from the least to the most sensitive, in lines of text."""
        order = sorted(range(len(self.kl)), key=lambda layer: (self.kl[layer], layer))
        lines = ["layer  KL [nats/position]  alignment error  becomes Mamba-2"]
        lines += [
            f"{layer:5d}  {self.kl[layer]:18.2e}  {self.alignment_error[layer]:15.4f}  "
            + ("yes" if layer in self.chosen else "no")
            for layer in order
        ]
        return "\n".join(lines)


def choose_by_sensitivity(
    recipe: Recipe, teacher: Checkpoint, data: DataManifest, folder: Path, reporter: Reporter, device: str
) -> SensitivityReport:
    """Measure the teacher's layers on ``data`` and choose ``recipe.hybrid.ratio`` of them; see ``measure``.

    Writes ``folder/sensitivity.json``, reports it as an artifact and every layer's figures as metrics.

    Raises:
        ValueError: too few samples, or none or all layers would be replaced.
    """
    model, processor = locate.load(teacher.uri, device, getattr(torch, recipe.teacher.dtype))
    report = measure(
        recipe, model, Encoder(processor, recipe.data.max_length, recipe.targets.positions), teacher.uri, data, reporter
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORT, report.model_dump(mode="json"))
    reporter.artifact(folder / REPORT, "sensitivity")
    for layer, (divergence, error) in enumerate(zip(report.kl, report.alignment_error, strict=True)):
        reporter.metrics({"sensitivity_kl": divergence, "alignment_error": error}, layer)
    return report


def read_report(folder: Path) -> SensitivityReport:
    """The report that ``choose_by_sensitivity`` wrote to ``folder``.

    Raises:
        StorageError: it is not there or not JSON.
        ValueError: it is JSON of another form.
    """
    return SensitivityReport.model_validate(read_json(folder / REPORT))


def measure(
    recipe: Recipe,
    model: PreTrainedModel,
    encoder: Encoder,
    teacher_uri: str,
    data: DataManifest,
    reporter: Reporter | None = None,
) -> SensitivityReport:
    """Align a mixer for every layer of the teacher ``model``, then try each alone. The same seed measures the same.

    The mixers start as ``recipe.hybrid.init`` says. Samples are drawn from ``data`` with ``recipe.seed``.

    Raises:
        ValueError: ``data`` has too few samples, or none or all layers would be replaced.
    """
    settings, (rows, _) = recipe.hybrid.sensitivity, split(open_dataset(data), recipe.distill.validation.samples)
    aligned_on, held_out = _draw(len(rows), settings.updates * settings.batch_size, settings.held_out_samples, recipe)
    autocast = None if recipe.distill.autocast == "off" else torch.bfloat16
    mixers = _mixers(model, recipe)
    if recipe.hybrid.init in CALIBRATED and (count := recipe.hybrid.calibration_samples):
        chunks = _chunks(aligned_on[:count], settings.batch_size)
        calibrate(model, mixers, (_batch(rows, chunk, encoder).inputs for chunk in chunks))
    with Progress(settings.updates, "alignment", "update", reporter) as progress:
        curves = align(
            model,
            {"layer": mixers},
            (_batch(rows, chunk, encoder).inputs for chunk in _chunks(aligned_on, settings.batch_size)),
            settings.optimizer,
            autocast,
            lambda _update: progress.update(1),
        )["layer"]
    batches = [_batch(rows, chunk, encoder) for chunk in _chunks(held_out, settings.batch_size)]
    alone = {layer: {layer: mixer} for layer, mixer in mixers.items()}
    with Progress(len(batches), "sensitivity", "batch", reporter) as progress:
        kl = divergences(model, alone, batches, autocast, lambda: progress.update(1))
    return SensitivityReport(
        teacher=teacher_uri,
        init=recipe.hybrid.init,
        seed=recipe.seed,
        data=data.fingerprint,
        updates=settings.updates,
        aligned_samples=len(set(aligned_on)),
        held_out_samples=len(held_out),
        positions=sum(int(batch.kept.sum()) for batch in batches),
        kl=[kl[layer] for layer in mixers],
        alignment_error=[_settled(curves[layer]) for layer in mixers],
        chosen=least_sensitive(list(kl.values()), recipe.hybrid.ratio),
    )


def _draw(num_rows: int, wanted: int, held_out: int, recipe: Recipe) -> tuple[list[int], list[int]]:
    """Rows to align on, ``wanted`` of them and repeated if there are not so many, and ``held_out`` others."""
    if num_rows <= held_out:
        raise ValueError(
            f"hybrid.sensitivity.held_out_samples is {held_out} and there are only {num_rows} samples: lower it, some "
            "have to be left to align on"
        )
    permutation = np.random.default_rng(recipe.seed).permutation(num_rows)
    rest = permutation[held_out:]
    return np.resize(rest, wanted).tolist(), permutation[:held_out].tolist()


def _mixers(model: PreTrainedModel, recipe: Recipe) -> dict[int, Mamba2Mixer]:
    """A mixer for every layer, started as ``recipe.hybrid.init`` says."""
    made: dict[int, Mamba2Mixer] = {}
    settings = recipe.hybrid
    for layer, block in enumerate(decoder_layers(model)):
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + layer)
        made[layer] = INITS[settings.init](block.self_attn, layer, generator, settings.chunk_size)
        made[layer].kernels = settings.kernels
    return made


@torch.inference_mode()
def divergences(
    model: PreTrainedModel,
    trials: Mapping[Trial, Mapping[int, Mamba2Mixer]],
    batches: Iterable[Batch],
    autocast: torch.dtype | None = None,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[Trial, float]:
    """KL(teacher || hybrid), in nats per kept position, of the hybrids that ``trials`` make of the teacher ``model``.

    The teacher runs once per batch for all of them.

    Args:
        trials: name -> layer number -> the mixer that takes the place of that layer's attention.
        batches: moved to the model's device.
        autocast: dtype of the matrix products, or None for that of the weights.
        on_batch: called after each batch.
    """
    sums, positions = dict.fromkeys(trials, 0.0), 0
    with torch.autocast(model.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        for batch in (batch.to(model.device) for batch in batches):
            expected = kept_logits(model, batch)
            positions += len(expected)
            for name, mixers in trials.items():
                with swapped(model, mixers):
                    sums[name] += float(dense_kl(expected, kept_logits(model, batch)))
            on_batch()
    return {name: total / positions for name, total in sums.items()}


@contextmanager
def swapped(model: PreTrainedModel, mixers: Mapping[int, nn.Module]) -> Iterator[PreTrainedModel]:
    """``model`` with ``mixers`` in the place of its attentions while the block lasts; forward passes without cache."""
    layers: Any = decoder_layers(model)
    attentions = {layer: layers[layer].self_attn for layer in mixers}
    try:
        for layer, mixer in mixers.items():
            layers[layer].self_attn = mixer
        yield model
    finally:
        for layer, attention in attentions.items():
            layers[layer].self_attn = attention


def _settled(curve: Curve) -> float:
    last = max(1, round(len(curve.relative) * SETTLED_SHARE))
    return float(np.mean(curve.relative[-last:]))


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _batch(rows: Any, chosen: Sequence[int], encoder: Encoder) -> Batch:
    return encode_rows(encoder, (rows[row] for row in chosen))
