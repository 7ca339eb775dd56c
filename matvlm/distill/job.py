"""A distillation as one value that processes on any number of machines can read, and what it reports as a file.

``make_job`` makes from a recipe whatever is missing for it: data, targets, student.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.data.encoding import Encoder
from matvlm.data.prepare import prepare
from matvlm.distill.trainer import distill, init_student
from matvlm.models import locate
from matvlm.reporting import Reporter
from matvlm.sensitivity import choose_by_sensitivity
from matvlm.storage import read_json, write_json
from matvlm.targets import TargetJob

JOB, EVENTS, STUDENT = "job.json", "events.jsonl", "student.json"


class DistillJob(BaseModel):
    """All that ``distill`` is called with, but who listens and the device."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe
    student: Checkpoint
    teacher: Checkpoint
    data: DataManifest
    targets: TargetStore
    folder: Path

    def run(self, reporter: Reporter, device: str) -> Checkpoint:
        """``distill``, in this process as one of those that torchrun has started, or alone.

        Raises:
            The errors of ``distill``.
        """
        torch.set_num_threads(max(1, self.recipe.resources.cpu // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        return distill(self.recipe, self.student, self.teacher, self.data, self.targets, self.folder, reporter, device)


class EventLog(Reporter):
    """Writes all that it hears to the file ``path``, a line of JSON each, for ``Tail``; what was there before goes."""

    def __init__(self, path: Path):
        self.path, self._started = path, False

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self._write("metrics", dict(values), step)

    def artifact(self, path: Path, folder: str = "") -> None:
        self._write("artifact", str(path), folder)

    def progress(self, done: int, total: int) -> None:
        self._write("progress", done, total)

    def published(self, folder: str, updates: int) -> None:
        self._write("published", folder, updates)

    def _write(self, kind: str, *arguments: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self._started else "w", encoding="utf-8") as file:
            file.write(json.dumps([kind, *arguments]) + "\n")
        self._started = True


class Tail:
    """Tells ``reporter`` what another process has written to the ``EventLog`` at ``path``."""

    def __init__(self, path: Path, reporter: Reporter):
        self.path, self.reporter, self._read = path, reporter, 0

    def catch_up(self) -> None:
        """Pass on what is new, in its order; a line still being written waits for the next time."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._read += len(line)
            self._pass_on(*json.loads(line))

    def _pass_on(self, kind: str, first: Any, second: Any) -> None:
        if kind == "metrics":
            self.reporter.metrics(first, second)
        elif kind == "artifact":
            self.reporter.artifact(Path(first), second)
        elif kind == "published":
            self.reporter.published(first, second)
        else:
            self.reporter.progress(first, second)


def read_job(path: Path) -> DistillJob:
    """The job in a file that ``make_job`` or a flow has written.

    Raises:
        ValueError: it is not one.
        StorageError: it cannot be read.
    """
    try:
        return DistillJob.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{path}: not the job of a distillation: {place}: {first['msg']}") from None


def make_job(recipe: Recipe, folder: Path, device: str) -> DistillJob:
    """Prepare data, targets and student in ``folder``, as far as they are not there, and write ``folder/job.json``.

    Raises:
        DataError, TargetError, StorageError: as ``prepare`` and ``TargetJob`` do.
        ValueError: the layers cannot be replaced, or ``folder`` holds a student that was made in another way.
    """
    model, processor = locate.load(recipe.teacher.uri, device, getattr(torch, recipe.teacher.dtype))
    data = prepare(recipe.data, recipe.seed, folder / "data", encoder=Encoder(processor, recipe.data.max_length))
    store = TargetJob(recipe, model, processor, data, str(folder / "targets"))
    store.compute(store.missing())
    targets = store.join()
    del model, store
    teacher = Checkpoint(uri=recipe.teacher.uri, label="teacher")
    student = make_student(recipe, teacher, data, folder, device)
    job = DistillJob(recipe=recipe, student=student, teacher=teacher, data=data, targets=targets, folder=folder)
    write_json(folder / JOB, job.model_dump(mode="json"))
    return job


def make_student(
    recipe: Recipe,
    teacher: Checkpoint,
    data: DataManifest,
    folder: Path,
    device: str,
    reporter: Reporter | None = None,
) -> Checkpoint:
    """The untrained student in ``folder/student``; one that is there is kept, as what continues needs it to the bit.

    Where its layers are chosen by sensitivity, ``folder/sensitivity`` has the report of that.

    Raises:
        ValueError: the layers cannot be chosen or replaced, or ``folder`` holds a student that was made in another way.
    """
    place = folder / STUDENT
    made_with = {
        "teacher": recipe.teacher.model_dump(mode="json"),
        "hybrid": recipe.hybrid.model_dump(mode="json", exclude={"compare_inits", "kernels"}),
        "seed": recipe.seed,
        "data": data.fingerprint,
    }
    if place.exists():
        record = read_json(place)
        for field, ours in made_with.items():
            if record["made_with"].get(field) != ours:
                raise ValueError(
                    f"{place}: {field} was {record['made_with'].get(field)!r} for the student there and is {ours!r} "
                    "now; use another folder, or remove this one to start over"
                )
        return Checkpoint.model_validate(record["student"])
    layers = None
    if recipe.hybrid.layers == "sensitivity":
        reporter = reporter or Reporter()
        layers = choose_by_sensitivity(recipe, teacher, data, folder / "sensitivity", reporter, device).chosen
    student = init_student(recipe, teacher, recipe.hybrid.init, data, folder / "student", layers, device)
    write_json(place, {"student": student.model_dump(mode="json"), "made_with": made_with})
    return student
