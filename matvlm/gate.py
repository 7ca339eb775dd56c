"""The promotion gate: whether an evaluated student may stand for the model's name, and why, in words."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from matvlm.artifacts import Artifact, EvalResult
from matvlm.config import PerTask, Promote, Recipe


class Verdict(Artifact):
    """A decision and what it rests on; scores and means are on the scale of ``TaskScore``."""

    passed: bool
    reasons: list[str]
    """A sentence for each condition that is not met; of a student that passed, how it stands beside the teacher."""
    recipe: str
    """Its name."""
    measured: str
    """sha256 over the tasks, their versions and all that was asked and expected. Only means of the same compare."""
    scores: dict[str, float]
    """Of the student, by task, as far as it has them."""
    mean: float | None = None
    """Over the tasks that count; None where one has no score. The same for the teacher and the drop."""
    teacher_mean: float | None = None
    drop: float | None = None
    """From ``teacher_mean`` to ``mean``, in percent of the former; below 0 if the student is better."""

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)

    @property
    def numbers(self) -> dict[str, float]:
        """The scores by task as ``score.TASK``, the means and the drop, as far as they are there."""
        means = {"mean": self.mean, "teacher_mean": self.teacher_mean, "drop": self.drop}
        scores = {f"score.{task}": score for task, score in self.scores.items()}
        return scores | {name: value for name, value in means.items() if value is not None}


def judge(recipe: Recipe, teacher: EvalResult, student: EvalResult) -> Verdict:
    """Hold ``student`` against ``teacher`` and ``recipe.promote``.

    A task that failed, has no score or was not the same for both refuses the student, whatever the thresholds.

    Raises:
        StorageError: the record beside a result's samples cannot be read.
    """
    tasks = recipe.judged_tasks
    theirs, ours = (
        {task: score.value for task, score in result.scores.items() if task in tasks and math.isfinite(score.value)}
        for result in (teacher, student)
    )
    pairs = {task: (theirs[task], ours[task]) for task in tasks if task in theirs and task in ours}
    asked = [_asked(result) for result in (teacher, student)]
    problems = [*_unmeasured(tasks, teacher, student), *_too_low(recipe.promote, pairs)]
    problems += [f"{task} was not the same for teacher and student" for task in pairs if _differs(task, *asked)]
    means: tuple[float, ...] = ()
    if tasks and len(pairs) == len(tasks):
        means = tuple(sum(scores) / len(tasks) for scores in zip(*pairs.values(), strict=True))
        most = recipe.promote.max_mean_drop
        if most is not None and drop(*means) > most:
            problems.append(f"the mean {_fall(*means)}, more than promote.max_mean_drop {most:g} %")
    return Verdict(
        passed=not problems,
        reasons=problems or [f"the mean of {', '.join(tasks)} {_fall(*means)}; every threshold is met"],
        recipe=recipe.name,
        measured=_sha256([[task, asked[1].get(task)] for task in tasks]),
        scores=ours,
        **({"teacher_mean": means[0], "mean": means[1], "drop": drop(*means)} if means else {}),
    )


def drop(teacher: float, student: float) -> float:
    """How far ``student`` is below ``teacher``, in percent of the latter; against a teacher at 0 it is none."""
    return 100 * (teacher - student) / teacher if teacher > 0 else 0.0


def _unmeasured(tasks: list[str], teacher: EvalResult, student: EvalResult) -> Iterator[str]:
    if not tasks:
        yield "no task counts: promote.tasks or evaluate.tasks of the recipe is empty"
    for who, result in (("teacher", teacher), ("student", student)):
        for task in tasks:
            if task in result.failed:
                yield f"{task} failed for the {who}: {result.failed[task]}"
            elif task not in result.scores or not math.isfinite(result.scores[task].value):
                yield f"{task} has no score for the {who}: leave it out of promote.tasks if it cannot have one"


def _too_low(wanted: Promote, pairs: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    for task, (teacher, student) in pairs.items():
        least, most = _of(wanted.min_score, task), _of(wanted.max_drop, task)
        if least is not None and student < least:
            yield f"{task} is {student:.2f}, below promote.min_score {least:g}"
        if most is not None and drop(teacher, student) > most:
            yield f"{task} {_fall(teacher, student)}, more than promote.max_drop {most:g} %"


def _of(threshold: PerTask, task: str) -> float | None:
    return threshold.get(task) if isinstance(threshold, dict) else threshold


def _fall(teacher: float, student: float) -> str:
    lost = drop(teacher, student)
    way = f"{lost:.2f} % below" if lost > 0 else f"{-lost:.2f} % above" if lost < 0 else "level with"
    return f"is {student:.2f}, {way} the teacher's {teacher:.2f}"


def _asked(result: EvalResult) -> dict[str, str]:
    """By task, what tells apart all that could have been asked: the record that ``evaluate`` leaves says it."""
    from matvlm.evaluate.results import records_of

    return {
        task: _sha256([record["identity"]["version"], record["data"]["sha256"]])
        for task, record in records_of(result.samples_uri).items()
    }


def _differs(task: str, teacher: Mapping[str, str], student: Mapping[str, str]) -> bool:
    return task not in student or teacher.get(task) != student[task]


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
