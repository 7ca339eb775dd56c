"""Distillations that ``test_distributed.py`` lets two processes do, one after the other, as starting is what costs.

torchrun starts it as ``distributed_cases.py FOLDER``; every process leaves what it saw in ``FOLDER/seen-RANK.json``.
The second one is given folders in ``FOLDER/second``, as one of another node would be.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiny_distill import NUM_SAMPLES, Kept, Stage

from matvlm.cli import main
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import open_dataset
from matvlm.distill.job import DistillJob, read_job
from matvlm.distill.schedule import order
from matvlm.storage import write_json
from matvlm.world import join

SAME: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded, 1": {"micro_batch_size": 1},
    "packed": {"packing": True},
    "packed, 1": {"packing": True, "micro_batch_size": 1},
    "zero 1, 1": {"engine": "deepspeed", "deepspeed": {"zero_stage": 1}, "micro_batch_size": 1},
    "zero 2, packed": {"engine": "deepspeed", "deepspeed": {"zero_stage": 2}, "packing": True},
}
"""Fields of ``distill``, none of which changes more than rounding: in each the second process has 1 of the last 3."""
SMALL = {"batch_size": 5, "micro_batch_size": 1, "checkpoint_every_updates": 1, "keep_checkpoints": 9}
"""The last batch of an epoch has one sample, so that the second process has none."""
VALIDATED = {"validation": {"samples": 1, "every_updates": 2}}
"""The second process has nothing to validate on."""


class Heard(Kept):
    """Keeps all that a reporter is told, and calls ``then`` after ``at`` updates of the run that reports."""

    def __init__(self, at: int = 0, then: Callable[[], None] | None = None):
        super().__init__()
        self.limit, self.call = at, then
        self.lost: dict[int, list[float]] = {}
        self.validated: dict[int, dict[str, float]] = {}
        self.artifacts: list[str] = []
        self.done = (0, 0)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if any(name.startswith("validation/") for name in values):
            self.validated[step] = dict(values)
            return
        super().metrics(values, step)
        self.lost[step] = [values["skipped_updates"], values["unusable_samples"]]
        if self.call and len(self.computed) == self.limit:
            self.call()

    def artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path.name)

    def progress(self, done: int, total: int) -> None:
        self.done = (done, total)


def job_of(stage: Stage, folder: Path) -> DistillJob:
    return DistillJob(**stage._asdict(), folder=folder)


def stage_of(job: DistillJob) -> Stage:
    return Stage(job.recipe, job.student, job.teacher, job.data, job.targets)


def ids_of(stage: Stage, update: int) -> list[str]:
    dataset = open_dataset(stage.data)
    return [dataset[row]["id"] for row in order(NUM_SAMPLES, 4, stage.recipe.seed, update)]


def breaking(stage: Stage) -> Callable[[Encoder, Any], Batch]:
    """For ``Encoder.collate``: batches with the second sample of update 2 get pixels that are no numbers."""
    collate, bad = Encoder.collate, ids_of(stage, 2)[1]

    def broken(self: Encoder, samples: Any) -> Batch:
        batch = collate(self, samples)
        if bad in batch.ids:
            batch.inputs["pixel_values"].fill_(math.nan)
        return batch

    return broken


def lost_image(stage: Stage) -> Path:
    """The picture of the second sample of update 1, which is the first one of the second process."""
    row = order(NUM_SAMPLES, 4, stage.recipe.seed, 1)[1]
    return Path(str(stage.recipe.data.path)).with_name(f"{row}.png")


def lenient(stage: Stage) -> Any:
    return stage.recipe.model_copy(update={"data": stage.recipe.data.model_copy(update={"max_bad_share": 0.1})})


def do_all(folder: Path) -> None:
    stage = stage_of(read_job(folder / "job.json"))
    world, _ = join("cpu")
    seen: dict[str, Any] = {}

    def do(name: str, recipe: Any, prepare: Callable[[], None] = lambda: None) -> None:
        if world.is_first:
            prepare()
        world.wait()
        heard, place = Heard(), folder if world.is_first else folder / "second"
        try:
            stage.run(place / name, heard, recipe=recipe)
            names = ("seen", "lost", "computed", "validated")
            seen[name] = {kind: getattr(heard, kind) for kind in names}
        except RuntimeError as error:
            seen[name] = {"error": str(error)}

    for name, fields in SAME.items():
        do(name, stage.but(**fields))
    do("small", stage.but(**SMALL))
    begun = [folder / name / "snapshots/update-000002" for name in ("small", "small, continued")]
    do("small, continued", stage.but(**SMALL), lambda: shutil.copytree(*begun))
    do("validated", stage.but(**VALIDATED))
    do("finished", stage.but(**SMALL), lambda: (folder / "finished").symlink_to(folder / "small"))
    do("different", stage.recipe.model_copy(update={"seed": stage.recipe.seed + world.rank}))
    collate, Encoder.collate = Encoder.collate, breaking(stage)  # type: ignore[method-assign]
    do("broken", stage.recipe)
    do("broken, strict", stage.but(max_skipped_updates=0))
    Encoder.collate = collate  # type: ignore[method-assign]
    picture = lost_image(stage)
    do("image lost", lenient(stage), lambda: picture.rename(folder / "hidden.png"))
    do("too many lost", stage.recipe)
    if world.is_first:
        (folder / "hidden.png").rename(picture)
    write_json(folder / f"seen-{world.rank}.json", seen)
    assert main(["distill", str(folder / "tiny.yaml"), "--out", str(folder / "command")]) == 0


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    do_all(Path(sys.argv[1]))
