"""What looking targets up costs beside a training step: every batch of one epoch, for each scheme and positions.

    python tests/benchmarks/targets_report.py [RECIPE] [FIELD=VALUE ...]

Prints a line per store: bytes a position, milliseconds to look a micro-batch up, milliseconds of an update per
micro-batch, and their ratio. Size, kept mass and gradient error are what ``python -m matvlm targets RECIPE --check 8``
prints. Without arguments it measures the default recipe on 100 of its images.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from matvlm.artifacts import Checkpoint, DataManifest
from matvlm.config import Recipe
from matvlm.data.prepare import open_dataset, prepare
from matvlm.distill import init_student
from matvlm.distill.run import Run, open_models
from matvlm.distill.schedule import num_updates
from matvlm.models import locate
from matvlm.recipes import load_recipe
from matvlm.targets import TargetJob, open_targets

RECIPE = Path(__file__).resolve().parents[2] / "flows" / "recipes" / "easyvqa.yaml"
STORES = [("topk_tail", "answer"), ("topk_tail", "all"), ("topk_sampled", "answer"), ("topk_sampled", "all")]
UPDATES = 6
"""Timed updates, after one that is not."""


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
    path, *changes = sys.argv[1:] or [str(RECIPE), "data.max_samples=100"]
    with TemporaryDirectory() as folder:
        recipe = load_recipe(path, changes)
        data = prepare(recipe.data, recipe.seed, Path(folder, "data"))
        teacher = Checkpoint(uri=recipe.teacher.uri, label="teacher")
        student = init_student(recipe, teacher, "paper", data, Path(folder, "student"), device=device)
        print("scheme        positions  bytes  lookup ms  update ms  share")
        for scheme, positions in STORES:
            top_k = 16 if scheme == "topk_sampled" else 32
            wanted = [f"targets.scheme={scheme}", f"targets.positions={positions}", f"targets.top_k={top_k}"]
            uri = str(Path(folder, f"{scheme}-{positions}"))
            measured = measure(load_recipe(path, [*changes, *wanted]), student, teacher, data, uri, device)
            print(f"{scheme:13s} {positions:9s}", *measured, flush=True)


def measure(
    recipe: Recipe, student: Checkpoint, teacher: Checkpoint, data: DataManifest, uri: str, device: str
) -> list[str]:
    model, processor = locate.load(teacher.uri, device, getattr(torch, recipe.teacher.dtype))
    job = TargetJob(recipe, model, processor, data, uri)
    job.compute(job.missing())
    size = job.join().bytes_per_position
    reader = open_targets(uri, job.identity)
    ids, micro = open_dataset(data)["id"][:], recipe.distill.micro_batch_size
    batches = [ids[start : start + micro] for start in range(0, len(ids) - micro + 1, micro)]
    lookup = statistics.median(
        timed(lambda batch=batch: (reader.lookup(batch), reader.draws(batch))) for batch in batches
    )
    run = Run(recipe, device, *open_models(recipe, student, teacher, device), open_dataset(data), reader)
    total = num_updates(recipe.distill, len(ids))
    times = [timed(lambda update=update: run.update(update, total)) for update in range(1, UPDATES + 2)]
    update = statistics.median(times[1:]) * micro / recipe.distill.batch_size
    return [f"{size:6.1f}", f"{lookup * 1e3:10.3f}", f"{update * 1e3:10.1f}", f"{lookup / update:6.2%}"]


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
