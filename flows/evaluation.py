"""What the flows share about finished models: one task of one model, results joined, speed, the model registry."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cards
import run_files
import support
from metaflow.integrations import ArgoEvent

from matvlm.artifacts import Checkpoint, EvalResult, ProfileResult
from matvlm.config import Recipe
from matvlm.gate import Verdict
from matvlm.reporting import Reporter
from matvlm.storage import StorageError, folder_name, join, local_copy, put

EVENT = "matvlm-checkpoint"
"""Published on a cluster for every registered checkpoint; its payload has ``checkpoint``, the registered version."""


def profile_models(flow: Any, recipe: Recipe, models: Iterable[Checkpoint], title: str) -> ProfileResult:
    """The step ``profile`` of ``flow``: speed and memory of ``models``, in its card, its report and its MLflow run."""
    from matvlm.profiling import profile
    from matvlm.report import write_profile

    page = cards.ProfileCard(title)
    with support.stage(flow, recipe, "profile", page) as reporter:
        result = profile(list(models), recipe.profile, reporter, support.device())
        write_profile(result, run_files.path(flow, "report"), reporter)
        page.show(result)
    return result


def evaluate_task(
    flow: Any, model: Checkpoint, recipe: Recipe, task: str, reporter: Reporter, device: str
) -> EvalResult:
    """``evaluate`` of one task, with a folder that all runs share: what ``model`` has answered once is not asked again.

    Raises:
        EvaluationError, StorageError: as ``evaluate`` does.
    """
    from matvlm.evaluate import EvaluationError, evaluate

    settings = recipe.evaluate.model_copy(update={"tasks": [task]})
    answered = join(folder_name(model.uri), f"{task}-{settings.limit or 'all'}")
    try:
        with _shared(flow, join(run_files.runs_uri(), "evaluations", answered)) as out:
            return evaluate(model, settings, settings.limit, out, reporter, device)
    except EvaluationError as error:
        raise EvaluationError(error.failed.get(task, str(error)), error.failed) from error


@contextmanager
def _shared(flow: Any, uri: str) -> Iterator[Path]:
    """The folder ``uri``. On S3, where runs cannot wait for each other, a copy of it that is sent back when whole."""
    if not uri.startswith("s3://"):
        with _alone(Path(uri)):
            yield Path(uri)
        return
    copy = run_files.path(flow, "answers", run_files.task_name(flow))
    if not copy.exists():
        with suppress(StorageError):  # nothing is there, or another run is replacing it now
            shutil.copytree(local_copy(uri), copy)
    yield copy
    put(copy, uri)


def join_tasks(models: dict[str, Any], inputs: Iterable[Any], folder: Path) -> list[EvalResult]:
    """The result of each of ``models`` over the tasks of a foreach; a task that failed is named in ``failed``.

    Args:
        models: by label, as JSON.
        inputs: of the joining step. Each has ``input``, label and task, and ``result``, or the ``failure`` of a task.

    Raises:
        EvaluationError: every task of a model failed.
    """
    from matvlm.evaluate import merge

    found: dict[str, list[EvalResult]] = {label: [] for label in models}
    for done in inputs:
        label, task = done.input
        model = Checkpoint.model_validate(models[label])
        found[label].append(_failed(model, task, done) if done.failure else EvalResult.model_validate(done.result))
    if any(result.failed for results in found.values() for result in results):
        print("To try again what failed, start a new run: a resumed one takes it for done. What was answered is kept.")
    return [merge(results, folder / label) for label, results in found.items()]


def _failed(model: Checkpoint, task: str, done: Any) -> EvalResult:
    reason = reason_of(done.failure)
    print(f"{task} failed for the {model.label}: {reason}")
    return EvalResult(
        label=model.label,
        checkpoint_uri=model.uri,
        metrics={},
        num_questions=0,
        seconds=0.0,
        samples_uri="",
        failed={task: reason},
    )


def reason_of(failure: Any) -> str:
    """What a step's ``@catch`` has caught, in one line."""
    return " ".join(str(failure.exception).split()) or str(failure.type)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Another run that wants the same answers waits here, and finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Registrar(Reporter):
    """Registers what the step of ``flow`` publishes while it works."""

    def __init__(self, flow: Any, recipe: Recipe, init: str):
        self.flow, self.recipe, self.init = flow, recipe, init

    def published(self, folder: str, updates: int) -> None:
        files = run_files.mirror(self.flow.folder)
        files.push()  # whoever hears of it may be elsewhere
        register(self.flow, self.recipe, files.uri_of(folder), {}, {"init": self.init, "updates": str(updates)})


def register(
    flow: Any, recipe: Recipe, uri: str, metrics: dict[str, float], tags: dict[str, str], verdict: Verdict | None = None
) -> str | None:
    """Register a student once, with its verdict if there is one, and tell the cluster; returns its version.

    None when MLflow is away: then it is registered later, without an event.
    """
    name = recipe.tracking.model_name
    with run_files.tracking(flow, recipe) as tracker:
        version = tracker.register(name, uri, "student", metrics, {"recipe": recipe.name, **tags})
        if verdict:
            print_verdict(verdict, tracker.promote(name, uri, verdict))
        if version:
            told = run_files.path(flow, "announced", run_files.task_name(flow))
            announce(f"models:/{name}/{version}", told / f"{name}-{version}")
    return version


def announce(checkpoint: str, told: Path) -> None:
    """Publish ``EVENT`` if this runs on Argo and the file ``told`` does not say that it was published already."""
    if "ARGO_WORKFLOW_TEMPLATE" not in os.environ or told.exists():
        return  # elsewhere Metaflow publishes nothing, and prints that for each
    if ArgoEvent(EVENT).safe_publish({"checkpoint": checkpoint}):
        told.parent.mkdir(parents=True, exist_ok=True)
        told.touch()


def print_verdict(verdict: Verdict, aliases: list[str] | None) -> None:
    given = "" if aliases is None else f" (aliases: {', '.join(aliases) or 'none'})"
    print(f"Promotion: {'passed' if verdict.passed else 'refused'}{given}: {verdict.reason}")
