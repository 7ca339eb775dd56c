"""Running one point of a sweep, from the teacher to an evaluated student, in a folder of its own.

Whatever was finished there is kept: the untrained student, snapshots, the trained student with what was measured.
"""

from __future__ import annotations

import json
import logging
import math
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from matvlm import storage
from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.distill import launch
from matvlm.distill.job import DistillJob, make_student
from matvlm.distill.trainer import MODEL
from matvlm.evaluate import evaluate
from matvlm.profiling import machine_facts
from matvlm.reporting import Reporter, Reporters
from matvlm.sweep.results import PointResult
from matvlm.sweep.settings import TEACHER, Trial
from matvlm.targets import content_settings

logger = logging.getLogger(__name__)

RESULT, ERROR = "result.json", "error.txt"
DIVERGENCE = "validation/loss_prob"


class Heard(Reporter):
    """What a distillation says of itself while it runs."""

    def __init__(self) -> None:
        self.curve: dict[int, float] = {}
        """Update -> divergence on held-out samples."""
        self.continued_from = 0
        """The last logged update that came from a snapshot: such updates have no speed."""
        self.memory_bytes = 0

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if math.isfinite(found := values.get(DIVERGENCE, math.nan)):
            self.curve[step] = found
        if "memory_gb" in values:
            self.memory_bytes = max(self.memory_bytes, round(1e9 * values["memory_gb"]))
        elif "lr" in values:
            self.continued_from = max(self.continued_from, step)


def shared_stores(trials: Iterable[Trial]) -> list[list[str]]:
    """The keys of the trials that read one and the same target store, for each store."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        found.setdefault(json.dumps(content_settings(trial.recipe), sort_keys=True), []).append(trial.key)
    return list(found.values())


class Shared(NamedTuple):
    """What a point does not make itself."""

    teacher: Checkpoint
    data: DataManifest
    targets: TargetStore


def run_point(trial: Trial, shared: Shared, folder: Path, reporter: Reporter, device: str) -> PointResult:
    """Make the student of ``trial``, distil it and evaluate it; or go on where that was interrupted.

    ``reporter`` hears all three stages, and in the end the figures by which points are compared.

    Raises:
        The errors of ``make_student``, ``launch.run`` and ``evaluate``. What led to one is in ``folder/error.txt``,
        which is kept with the run.
    """
    place = folder / RESULT
    try:
        if not place.exists():
            _keep(_distilled(trial, shared, folder, reporter, device), place)
        result = PointResult.model_validate(storage.read_json(place))
        if "evaluate" not in result.seconds and result.student:
            student = result.student.model_copy(update={"uri": str(folder / MODEL)})  # this copy of the run's files
            result = result.model_copy(update={"student": student})
            result = _keep(_evaluated(result, trial.recipe, folder, reporter, device), place)
    except Exception as error:
        logger.error("%s failed: %s: %s", trial.label, type(error).__name__, error)
        storage.write_bytes(folder / ERROR, traceback.format_exc().encode())
        reporter.artifact(folder / ERROR)
        raise
    reporter.metrics(figures(result))
    return result


def evaluate_teacher(recipe: Recipe, teacher: Checkpoint, folder: Path, reporter: Reporter, device: str) -> PointResult:
    """What the points are held against.

    Raises:
        EvaluationError, StorageError: as ``evaluate`` does.
    """
    alone = PointResult(name=TEACHER, machine=_machine(device), student=teacher)
    return _evaluated(alone, recipe, folder, reporter, device)


def figures(result: PointResult) -> dict[str, float]:
    """The numbers of a point that are metrics of its own in MLflow; scores and curve are there from its stages."""
    numbers = {f"seconds/{stage}": seconds for stage, seconds in result.seconds.items()}
    numbers["peak_memory_gb"] = result.peak_memory_bytes / 1e9
    numbers |= {"replaced_layers": len(result.layers), "trained_parameters": result.trained_parameters}
    return numbers if result.final_kl is None else numbers | {"final_kl": result.final_kl}


def remove_models(result: PointResult, trial: Trial, folder: Path, keep_student: bool) -> PointResult:
    """Remove the untrained student and the snapshots of a point that is done and, unless it is to be kept, its student.

    Returns:
        ``result`` as it is then.
    """
    snapshots = trial.recipe.distill.snapshots
    storage.remove(folder / "student")
    storage.remove(
        folder / "snapshots" if snapshots is None else storage.join(snapshots, *folder.absolute().parts[-3:])
    )
    if keep_student:
        return result
    result = _keep(result.model_copy(update={"student": None}), folder / RESULT)
    storage.remove(folder / MODEL)
    return result


def _distilled(trial: Trial, shared: Shared, folder: Path, reporter: Reporter, device: str) -> PointResult:
    recipe, heard, seconds = trial.recipe, Heard(), dict[str, float]()
    with _timed(seconds, "init"):
        student = make_student(recipe, shared.teacher, shared.data, folder, device, reporter)
    job = DistillJob(recipe=recipe, student=student, folder=folder, **shared._asdict())
    with _timed(seconds, "distill"):
        trained = launch.run(job, Reporters(reporter, heard), device)
    assert trained is not None
    curve = sorted(heard.curve.items())
    return PointResult(
        name=trial.name,
        seed=trial.seed,
        overrides=trial.overrides,
        layers=trained.layers,
        updates=trained.updates,
        continued_from=heard.continued_from,
        seconds=seconds,
        peak_memory_bytes=heard.memory_bytes,
        machine=_machine(device),
        trained_parameters=trained.trained_parameters,
        curve=curve,
        final_kl=curve[-1][1] if curve else None,
        student=trained.model_copy(update={"label": trial.name}),
    )


def _evaluated(result: PointResult, recipe: Recipe, folder: Path, reporter: Reporter, device: str) -> PointResult:
    assert result.student is not None
    settings = recipe.evaluate
    return result.evaluated(evaluate(result.student, settings, settings.limit, folder / "evaluation", reporter, device))


def _keep(result: PointResult, place: Path) -> PointResult:
    storage.write_json(place, result.model_dump(mode="json"))
    return result


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started


def _machine(device: str) -> str:
    facts = machine_facts(torch.device(device))
    return facts.get("gpu") or facts["cpu"]
