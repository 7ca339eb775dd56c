"""From lm-eval's results of a task to its metrics, to the one score that stands for it, and to a row per question."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from matvlm.artifacts import TaskScore
from matvlm.evaluate.results import Row

Sample = dict[str, Any]

PARTS = 50
"""Of the questions, at most, that are left out in turn to estimate a standard error."""
PARTS_SEED = 0
RIGHT = 0.5
"""The score from which on an answer counts as right where a task does not say it itself."""


def metrics_of(task: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """The task's metrics over ``samples``, by the task's own aggregates.

    lm-eval's own results are the same, but of several processes they have the metrics only that the first one met. What
    is not a number, such as a category that was not asked about, is left out.
    """
    aggregates = task.aggregation()
    names = dict.fromkeys(name for sample in samples for name in sample["metrics"])
    values = {name: aggregates[name]([sample[name] for sample in samples if name in sample]) for name in names}
    return {name: number for name, value in values.items() if (number := _number(value)) is not None}


def score_of(task: Any, metrics: Mapping[str, float], samples: Sequence[Sample]) -> TaskScore | None:
    """The metric that ``score`` of the task's metadata names, times their ``scale``; None if there is none."""
    metadata: dict[str, Any] = task.config.metadata or {}
    metric, scale = str(metadata.get("score")), float(metadata.get("scale", 1))
    if metric not in metrics:
        return None
    together = str(metadata.get("group") or "image_id")
    error = standard_error(task.aggregation()[metric], metric, samples, together)
    return TaskScore(metric=metric, value=metrics[metric] * scale, stderr=None if error is None else error * scale)


def standard_error(
    aggregate: Callable[[list[Any]], float], metric: str, samples: Sequence[Sample], together: str = "image_id"
) -> float | None:
    """Of ``metric``: lm-eval's for a mean, and else the jackknife, which leaves out a part of the questions at a time.

    That serves any aggregate, also one of questions that are scored together: those with the same value in the column
    ``together`` are left out together. None if it is not a number.
    """
    from lm_eval.api.metrics import mean, mean_stderr

    asked = [sample for sample in samples if metric in sample]
    if len(asked) < 2:
        return None
    if aggregate is mean:
        return _finite(float(mean_stderr([sample[metric] for sample in asked])))
    units: dict[str, list[Any]] = defaultdict(list)
    for sample in asked:
        units[str(sample["doc"].get(together, sample["doc_id"]))].append(sample[metric])
    names = sorted(units)
    random.Random(PARTS_SEED).shuffle(names)
    count = min(PARTS, len(names))
    if count < 2:
        return None
    parts = [{*names[part::count]} for part in range(count)]
    values = [float(aggregate([v for name in names if name not in part for v in units[name]])) for part in parts]
    middle = fmean(values)
    return _finite(math.sqrt((count - 1) / count * sum((value - middle) ** 2 for value in values)))


def row_of(task: Any, name: str, sample: Sample) -> Row:
    """What is kept of a question: ``score`` is in [0, 1] and ``right`` a truth value, both null where nobody knows.

    Of a text, ``question`` is all of it, and ``target`` null.
    """
    doc = sample["doc"]
    value = sample.get(str((task.config.metadata or {}).get("score")))
    score = _number(value) if _number(value) is not None else _number(sample.get("right"))
    right = _number(sample.get("right", score))
    return {
        "task": name,
        "id": str(doc.get("id", sample["doc_id"])),
        "number": sample["doc_id"],
        "image_id": doc.get("image_id"),
        "question": doc.get("question", sample["arguments"][0][0]),
        "target": None if task.OUTPUT_TYPE == "loglikelihood_rolling" else sample["target"],
        "answer": answer_of(sample),
        "score": score,
        "right": None if right is None else right >= RIGHT,
    }


def answer_of(sample: Sample) -> str:
    """What the model said, the continuation that it finds most likely, or its log-likelihood of a text, in nats."""
    given = sample["filtered_resps"]
    if isinstance(given[0], str):
        return given[0].strip()
    if isinstance(given[0], float):
        return f"{given[0]:.3f}"
    likeliest = max(range(len(given)), key=lambda number: given[number][0])
    return str(sample["arguments"][likeliest][1]).strip()


def _number(value: Any) -> float | None:
    return _finite(float(value)) if isinstance(value, bool | int | float) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
