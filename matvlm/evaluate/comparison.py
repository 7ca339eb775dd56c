"""Teacher and student side by side: the score of each task, and questions as both answered them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matvlm.artifacts import EvalResult, TaskScore
from matvlm.evaluate.results import Row, read_rows, records_of

logger = logging.getLogger(__name__)

MEAN = "mean"
"""Names the row of the mean over all tasks that both have a score of."""


class ScoreRow(NamedTuple):
    """One task's scores on the paper's scale. ``teacher`` or ``student`` is None where there is no score."""

    task: str
    metric: str
    teacher: TaskScore | None
    student: TaskScore | None
    drop: float | None
    """Points that the student is below the teacher; None unless both have a score."""
    drop_percent: float | None
    """``drop`` as a share of the teacher's score; None also where that is 0."""
    note: str = ""
    """Whose evaluation failed, and why."""


@dataclass(frozen=True)
class ComparedSample:
    """One question as teacher and student answered it. ``png`` is the encoded image."""

    id: str
    question: str
    expected: str
    teacher_answer: str
    student_answer: str
    teacher_right: bool
    student_right: bool
    png: bytes
    task: str = ""


def compare(teacher: EvalResult, student: EvalResult) -> list[ScoreRow]:
    """A row per task that either has a score of or failed in, in the teacher's order, and the mean of common tasks."""
    tasks = dict.fromkeys([*teacher.scores, *teacher.failed, *student.scores, *student.failed])
    rows = [_score_row(task, teacher, student) for task in tasks]
    pairs = [(row.teacher.value, row.student.value) for row in rows if row.teacher and row.student]
    if len(pairs) > 1:
        means = [TaskScore(metric=MEAN, value=sum(values) / len(pairs)) for values in zip(*pairs, strict=True)]
        rows.append(_row(MEAN, *means))
    return rows


def compare_samples(teacher_samples: str, student_samples: str, n: int, seed: int) -> list[ComparedSample]:
    """``n`` questions that both evaluations answered, half of them answered differently as far as there are such.

    Texts, to which there is no answer, are none.

    Args:
        teacher_samples, student_samples: URIs of two ``samples.jsonl``.
        seed: decides which; the result is in the order of the evaluation.

    Raises:
        StorageError: a file is missing or cannot be read.
    """
    teacher, student = read_rows(teacher_samples), read_rows(student_samples)
    common = [key for key in teacher if key in student and teacher[key]["target"] is not None]
    differing = [key for key in common if teacher[key]["answer"] != student[key]["answer"]]
    agreeing = [key for key in common if teacher[key]["answer"] == student[key]["answer"]]
    draw = random.Random(seed)
    half = max(n - n // 2, n - len(agreeing))
    shown = draw.sample(differing, min(half, len(differing)))
    shown += draw.sample(agreeing, min(n - len(shown), len(agreeing)))
    return _compared([(teacher[key], student[key]) for key in common if key in set(shown)], teacher_samples)


def worst_regressions(teacher_samples: str, student_samples: str, n: int, seed: int) -> list[ComparedSample]:
    """At most ``n`` questions that the teacher answered right and the student wrong, the largest loss of score first.

    Among equal losses the tasks take turns, and ``seed`` decides which questions of a task are shown.

    Raises:
        StorageError: a file is missing or cannot be read.
    """
    teacher, student = read_rows(teacher_samples), read_rows(student_samples)
    lost = [key for key in teacher if key in student and teacher[key]["right"] and student[key]["right"] is False]
    random.Random(seed).shuffle(lost)
    turn = {key: sum(other[0] == key[0] for other in lost[:place]) for place, key in enumerate(lost)}
    lost.sort(key=lambda key: (student[key]["score"] - teacher[key]["score"], turn[key], key))
    return _compared([(teacher[key], student[key]) for key in lost[:n]], teacher_samples)


def _score_row(task: str, teacher: EvalResult, student: EvalResult) -> ScoreRow:
    failures = {result.label: result.failed[task] for result in (teacher, student) if task in result.failed}
    row = _row(task, teacher.scores.get(task), student.scores.get(task))
    return row._replace(note="; ".join(f"{label} failed: {error}" for label, error in failures.items()))


def _row(task: str, teacher: TaskScore | None, student: TaskScore | None) -> ScoreRow:
    metric = next((score.metric for score in (teacher, student) if score), "")
    if not (teacher and student):
        return ScoreRow(task, metric, teacher, student, None, None)
    drop = teacher.value - student.value
    return ScoreRow(task, metric, teacher, student, drop, 100 * drop / teacher.value if teacher.value else None)


def _compared(pairs: Sequence[tuple[Row, Row]], samples_uri: str) -> list[ComparedSample]:
    """``samples_uri`` is the teacher's, beside which it says what data the questions are from."""
    records = records_of(samples_uri)
    pictures = {task: _pictures(task, records) for task in {teacher["task"] for teacher, _ in pairs}}
    return [
        ComparedSample(
            id=teacher["id"],
            question=teacher["question"],
            expected=str(teacher["target"]),
            teacher_answer=teacher["answer"],
            student_answer=student["answer"],
            teacher_right=bool(teacher["right"]),
            student_right=bool(student["right"]),
            png=pictures[teacher["task"]](teacher["number"]),
            task=teacher["task"],
        )
        for teacher, student in pairs
    ]


def _pictures(name: str, records: Mapping[str, Any]) -> Callable[[int], bytes]:
    """What gives the encoded image of a question of the task ``name``, or nothing where its data are gone."""
    from matvlm.evaluate import tasks

    data = records.get(name, {}).get("data", {})
    root = {name: data["root"]} if data.get("root") else {}
    try:
        task = tasks.build([name], root, **({"hub_org": data["hub_org"]} if "hub_org" in data else {}))[name]
    except (OSError, ValueError) as error:
        logger.warning("%s: questions are shown without their images: %s", name, error)
        return lambda number: b""

    def picture(number: int) -> bytes:
        try:
            return tasks.png(task, task.eval_docs[number])
        except (OSError, ValueError, IndexError) as error:
            logger.warning("%s: question %d is shown without its image: %s", name, number, error)
            return b""

    return picture
