"""Evaluation of a checkpoint through lm-eval, and what two such evaluations say of teacher and student."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvlm.artifacts import Checkpoint, EvalResult, TaskScore
from matvlm.config import Evaluate
from matvlm.evaluate.comparison import ComparedSample, ScoreRow, compare, compare_samples, worst_regressions
from matvlm.evaluate.results import RESULTS, SAMPLES, EvaluationError, merge, read_result, refuse_none, write
from matvlm.evaluate.running import TaskRun
from matvlm.reporting import Reporter
from matvlm.storage import read_bytes

if TYPE_CHECKING:
    from matvlm.world import World

__all__ = [
    "ComparedSample",
    "EvaluationError",
    "ScoreRow",
    "compare",
    "compare_samples",
    "evaluate",
    "merge",
    "read_result",
    "worst_regressions",
]

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: Checkpoint,
    settings: Evaluate,
    limit: int | None,
    out: Path,
    reporter: Reporter,
    device: str = "cpu",
) -> EvalResult:
    """Run the tasks of ``settings`` on ``checkpoint``, one after the other, and write what comes out into ``out``.

    ``out/TASK`` gets the task's ``samples.jsonl`` and ``results.json`` as soon as it is done, and answers as soon as
    they are given: after an interruption the same call goes on from there. ``out`` gets the same two files of all
    tasks. A task that fails is named in ``failed`` with its error, and the others are evaluated.

    With ``limit``, each task is reduced to that many questions, evenly spaced over its split, so that all checkpoints
    with the same limit answer the same questions. Processes that torchrun has started share the questions; all of them
    get the result, the first one writes and reports. ``reporter`` also gets questions_per_second.

    Raises:
        EvaluationError: the checkpoint cannot be opened or has no image processor, or all tasks failed.
        StorageError: ``out`` cannot be written.
    """
    from matvlm.evaluate.checkpoint import model_hash, open_checkpoint
    from matvlm.evaluate.harness import VLM
    from matvlm.world import LONGEST_WAIT, join

    world, device = join(device, LONGEST_WAIT)
    model, processor = open_checkpoint(checkpoint.uri, device)
    label = f"evaluate {checkpoint.label}"
    vlm = partial(VLM, model, processor, settings.batch_size, reporter, label, world)
    hashed = model_hash(model, processor)
    runs = [TaskRun(name, settings, limit, out / name, hashed, vlm) for name in settings.tasks]
    records, failed = _run_all(runs, world)
    refuse_none(checkpoint.uri, records, failed)
    result = None
    if world.is_first:
        result = _joined(checkpoint, records, failed, out)
        _report(result, records, out, reporter)
    shared: EvalResult = world.gather(result)[0]
    return shared


def _run_all(runs: Sequence[TaskRun], world: World) -> tuple[dict[str, Any], dict[str, str]]:
    """The record of each task that could be evaluated, None but in the first process, and the error of each other."""
    records: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for run in runs:
        task = None
        try:
            task = _together(world, run.build)
            records[run.name] = run.run(task, world.rank)
        except Exception as error:
            if world.size > 1 and task is not None:
                raise  # the others may be waiting for this process
            clear = _is_clear(error, building=task is None)
            failed[run.name] = str(error) if clear else f"{type(error).__name__}: {error}"
            logger.warning("%s: %s", run.name, failed[run.name], exc_info=None if clear else error)
    return records, failed


def _together(world: World, make: Callable[[], Any]) -> Any:
    """What ``make`` returns in this process.

    Raises:
        Exception: its own error, or that of another process, in every one of them.
    """
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    errors = [each for each in world.gather(None if error is None else str(error)) if each is not None]
    if error is not None:
        raise error
    if errors:
        raise EvaluationError(errors[0])
    return made


def _joined(checkpoint: Checkpoint, records: dict[str, Any], failed: dict[str, str], out: Path) -> EvalResult:
    metrics = {task: record["metrics"] for task, record in records.items()}
    result = EvalResult(
        label=checkpoint.label,
        checkpoint_uri=checkpoint.uri,
        metrics={f"{task}/{name}": value for task, values in metrics.items() for name, value in values.items()},
        num_questions=sum(record["questions"]["asked"] for record in records.values()),
        seconds=sum(record["seconds"] for record in records.values()),
        samples_uri=str(out / SAMPLES),
        scores={task: TaskScore(**record["score"]) for task, record in records.items() if record["score"]},
        failed=failed,
    )
    return write(result, records, b"".join(read_bytes(out / task / SAMPLES) for task in records), out)


def _report(result: EvalResult, records: dict[str, Any], out: Path, reporter: Reporter) -> None:
    values = dict(result.metrics)
    for task, score in result.scores.items():
        values[f"score/{task}"] = score.value
        if score.stderr is not None:
            values[f"score_stderr/{task}"] = score.stderr
    if result.mean_score is not None:
        values["score/mean"] = result.mean_score
    if result.seconds:
        values["questions_per_second"] = result.num_questions / result.seconds
    reporter.metrics(values)
    for name in (SAMPLES, RESULTS):
        reporter.artifact(out / name, "evaluation")
    for task, record in records.items():
        if record["submission"]:
            reporter.artifact(Path(record["submission"]), f"submissions/{task}")


def _is_clear(error: Exception, building: bool) -> bool:
    """Whether its message says enough. What a task says of its data does, wherever lm-eval has loaded it from."""
    ours = type(error).__module__.partition(".")[0] == "matvlm"
    return ours or (building and isinstance(error, ValueError | OSError))
