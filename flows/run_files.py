"""The files of a run: where they are kept, a step's own copy of them, and the journals that MLflow is told from.

A run's folder is local or on S3. Steps may be on different machines, so what one hands to the next names files by where
the run keeps them, and each works on a copy of the parts it opens (``matvlm.storage.Mirror``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from metaflow import current, metaflow_config

from matvlm.artifacts import Artifact
from matvlm.storage import Mirror, join
from matvlm.tracking import TRACKING, Status, Tracker

URIS = {"uri", "samples_uri"}
"""Fields of artifacts that may be paths in the run's folder."""


def runs_uri() -> str:
    """Where runs keep their files: ``MATVLM_RUNS``, local or ``s3://...``.

    Without it, beside what Metaflow keeps if that is on S3, and else in ``runs`` in the current folder.
    """
    uri = os.environ.get("MATVLM_RUNS")
    if not uri and metaflow_config.DEFAULT_DATASTORE == "s3":
        uri = join(metaflow_config.DATASTORE_SYSROOT_S3, "matvlm-runs")
    return uri if uri and "://" in uri else str(Path(uri or "runs").resolve())


@functools.cache
def mirror(uri: str) -> Mirror:
    """The files of the run at ``uri`` as this process has them."""
    return Mirror(uri)


def path(flow: Any, *parts: str) -> Path:
    """A part of the run's folder, with what earlier steps and attempts left in it; its parent exists."""
    return mirror(flow.folder).open(*parts)


def keep(flow: Any, artifact: Artifact) -> dict[str, Any]:
    """``artifact`` as JSON for other steps, which may be elsewhere: files of the run by where the run keeps them."""
    files, fields = mirror(flow.folder), artifact.model_dump(mode="json")
    ours = {name for name in URIS & fields.keys() if Path(fields[name]).is_relative_to(files.folder)}
    return fields | {name: files.uri_of(fields[name]) for name in ours}


def tracking(flow: Any, recipe: Any) -> AbstractContextManager[Tracker]:
    """The MLflow side of the run; whatever the block writes in the run's folder is kept there when it ends."""
    return tracker(flow.run_key, flow.folder, recipe.tracking.experiment, task_name(flow))


def task_name(flow: Any) -> str:
    """Of this task, the same in every attempt: ``distill.0``."""
    return ".".join([current.step_name, *(str(frame[0]) for frame in flow.foreach_stack() or [])])


@contextmanager
def tracker(run_key: str, folder: str, experiment: str, task: str) -> Iterator[Tracker]:
    """Journals are the task's own, because tasks on different machines do not see each other's files."""
    with mirror(folder) as files:
        files.open(TRACKING, task)
        yield Tracker(run_key, files.folder, experiment, part=task, kept=folder)


def finish(flow: Any, recipe: Any, summary: Mapping[str, float] | None = None) -> None:
    """End the run in MLflow, with the results by which runs are compared, and deliver what is not there yet."""
    with tracking(flow, recipe) as tracker:
        if summary:
            tracker.summary(summary)
    close(flow.run_key, flow.folder, recipe.tracking.experiment, "FINISHED", current.step_name)


def close(run_key: str, folder: str, experiment: str, status: Status, task: str) -> None:
    """End the run in MLflow, and deliver what all of its tasks have left."""
    with tracker(run_key, folder, experiment, task) as mlflow_run:
        for part in mirror(folder).parts(TRACKING):
            mirror(folder).open(part)
        mlflow_run.finish(status)
