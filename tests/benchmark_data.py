"""Small data sets in the real file formats of the benchmarks: as on the hub, in parquet, and from their authors.

``write(task, folder, layout)`` makes one; ``LAYOUTS`` says which layouts a task has. Questions and answers are the same
in all layouts of a task, and so are the images.
"""

from __future__ import annotations

from pathlib import Path

import benchmark_choice
import benchmark_open
from benchmark_files import picture

__all__ = ["LAYOUTS", "TASKS", "picture", "write"]

WRITERS = {**benchmark_open.WRITERS, **benchmark_choice.WRITERS}
LAYOUTS = list(WRITERS)
"""Every pair of a task and one of its layouts."""
TASKS = sorted({task for task, _ in WRITERS})


def write(task: str, folder: Path, layout: str = "hub") -> Path:
    """Make the small data set of ``task`` in ``folder``, which is returned for use as its data root."""
    folder.mkdir(parents=True, exist_ok=True)
    WRITERS[task, layout](folder)
    return folder
