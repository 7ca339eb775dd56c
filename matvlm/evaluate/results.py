"""What an evaluation leaves behind: answers and scores by task, where they come from, and how such results are joined.

``OUT/results.json`` is the ``EvalResult`` with the record of each task under ``tasks``; ``OUT/samples.jsonl`` holds the
answers of all tasks. ``OUT/TASK/`` has the same two files of one task, written when it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matvlm.artifacts import EvalResult
from matvlm.storage import exists, join, read_bytes, read_json, write_bytes, write_json

SAMPLES, RESULTS = "samples.jsonl", "results.json"

Row = dict[str, Any]


class EvaluationError(ValueError):
    """An evaluation that cannot be run; the message names the checkpoint or task and what is wrong with it.

    ``failed`` has the error of each task where it was the tasks that failed.
    """

    def __init__(self, message: str, failed: Mapping[str, str] | None = None):
        super().__init__(message)
        self.failed = dict(failed or {})


def merge(results: Sequence[EvalResult], out: Path) -> EvalResult:
    """Join results of different tasks of one checkpoint, as ``evaluate`` of all of them would have made, into ``out``.

    A result in which every task failed may have an empty ``samples_uri``.

    Raises:
        EvaluationError: no results, results of different checkpoints, a task in two of them, or only failed tasks.
        StorageError: a result's files cannot be read, or ``out`` cannot be written.
    """
    models = {(result.label, result.checkpoint_uri) for result in results}
    if len(models) != 1:
        raise EvaluationError(f"merge: expected results of one checkpoint, got those of {sorted(models) or 'none'}")
    records: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for result in results:
        its = records_of(result.samples_uri)
        if twice := [*({*its, *result.failed} & {*records, *failed})]:
            raise EvaluationError(f"merge: results of {', '.join(sorted(twice))} are there twice")
        records |= its
        failed |= result.failed
    samples = b"".join(read_bytes(result.samples_uri) for result in results if result.samples_uri)
    ((label, uri),) = models
    joined = EvalResult(
        label=label,
        checkpoint_uri=uri,
        metrics={name: value for result in results for name, value in result.metrics.items()},
        num_questions=sum(result.num_questions for result in results),
        seconds=sum(result.seconds for result in results),
        samples_uri=str(out / SAMPLES),
        scores={task: score for result in results for task, score in result.scores.items()},
        failed=failed,
    )
    return write(joined, records, samples, out)


def write(result: EvalResult, records: Mapping[str, Any], samples: bytes, out: Path) -> EvalResult:
    """Write ``results.json`` and ``samples.jsonl`` of ``result`` into ``out``; returns ``result``.

    Raises:
        EvaluationError: all tasks failed.
    """
    refuse_none(result.checkpoint_uri, records, result.failed)
    write_bytes(out / SAMPLES, samples)
    write_json(out / RESULTS, {**result.model_dump(mode="json"), "tasks": dict(records)})
    return result


def refuse_none(uri: str, records: Mapping[str, Any], failed: Mapping[str, str]) -> None:
    """Raise an ``EvaluationError`` that has the errors of all tasks of the checkpoint at ``uri`` if they all failed."""
    if not records:
        reasons = "; ".join(f"{task}: {error}" for task, error in failed.items())
        raise EvaluationError(f"{uri}: no task could be evaluated: {reasons}", failed)


def read_result(out: Path) -> EvalResult:
    """The result that ``evaluate`` has written into ``out``.

    Raises:
        EvaluationError: the ``results.json`` there is that of something else.
        StorageError: there is none, or it cannot be read.
    """
    written = read_json(out / RESULTS)
    try:
        return EvalResult.model_validate({name: written[name] for name in EvalResult.model_fields})
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError(f"{out / RESULTS}: not the result of an evaluation: {error!r}") from None


def records_of(samples_uri: str) -> dict[str, Any]:
    """By task, how the answers in ``samples_uri`` came about: from the ``results.json`` beside it, if there is one."""
    beside = join(samples_uri.rpartition("/")[0] or ".", RESULTS)
    if not samples_uri or not exists(beside):
        return {}
    tasks: dict[str, Any] = read_json(beside)["tasks"]
    return tasks


def to_lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_rows(samples_uri: str) -> dict[tuple[str, str], Row]:
    """The rows of a ``samples.jsonl`` by task and id, in their order.

    Raises:
        StorageError: it is missing or cannot be read.
    """
    rows = map(json.loads, read_bytes(samples_uri).splitlines())
    return {(row["task"], row["id"]): row for row in rows}
