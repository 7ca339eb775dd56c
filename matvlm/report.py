"""A run's results side by side: the accuracy table, the speed and memory table, and a page of answered questions."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from matvlm import plots
from matvlm.artifacts import Checkpoint, EvalResult, ProfileResult
from matvlm.evaluate import ComparedSample, ScoreRow
from matvlm.profiling import compare, stack_gains
from matvlm.profiling.tables import as_csv, method, tables
from matvlm.reporting import Reporter
from matvlm.storage import write_bytes, write_json

TEACHER = "teacher"


class Row(NamedTuple):
    """One model of the accuracy table: its accuracy on its ``num_questions``, which may be fewer than the teacher's."""

    label: str
    init: str
    updates: int
    accuracy: float
    share: float
    """``accuracy`` over the teacher's; nan where the teacher answered nothing right."""
    num_questions: int
    kinds: dict[str, float]
    """Accuracy by kind of question, where the task has kinds."""


def common_task(tasks: Sequence[str], results: Sequence[EvalResult]) -> str:
    """The first of ``tasks`` that every result has a score of, by which models are ranked.

    Raises:
        ValueError: there is none; the message says which tasks failed.
    """
    for task in tasks:
        if all(task in result.scores for result in results):
            return task
    failed = [f"{result.label}, {task}: {error}" for result in results for task, error in result.failed.items()]
    raise ValueError(f"report: no task has a score for every model ({'; '.join(failed) or 'none failed'})")


def rows(checkpoints: Sequence[Checkpoint], results: Sequence[EvalResult], task: str) -> list[Row]:
    """The score of every model on ``task``, as a share of the best possible one: an accuracy, in [0, 1].

    The teacher is the measure of the others.

    Raises:
        ValueError: the results are not those of ``checkpoints``, in their order, there is no teacher among them, or one
            has no such score.
    """
    labels, found = ([one.label for one in those] for those in (checkpoints, results))
    if labels != found or TEACHER not in labels:
        raise ValueError(f"report: results of {found} do not fit the models {labels}, one of them {TEACHER!r}")
    of_teacher = _accuracy(results[labels.index(TEACHER)], task)
    return [
        Row(
            label=checkpoint.label,
            init=checkpoint.init or "-",
            updates=checkpoint.updates if checkpoint.init else 0,
            accuracy=_accuracy(result, task),
            share=_accuracy(result, task) / of_teacher if of_teacher else math.nan,
            num_questions=result.num_questions,
            kinds={
                name.removeprefix(f"{task}/accuracy_"): value
                for name, value in result.metrics.items()
                if name.startswith(f"{task}/accuracy_")
            },
        )
        for checkpoint, result in zip(checkpoints, results, strict=True)
    ]


def _accuracy(result: EvalResult, task: str) -> float:
    if task not in result.scores:
        raise ValueError(f"report: {result.label} has no score of {task}: {result.failed.get(task, 'nothing failed')}")
    return result.scores[task].value / 100


def write_accuracy(table: Sequence[Row], samples: Sequence[ComparedSample], folder: Path, reporter: Reporter) -> None:
    """``accuracy.md``, ``accuracy.png`` and ``answers.html`` into ``folder``, kept with the run under ``report``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "accuracy.md", accuracy_table(table).encode())
    plots.accuracy_bars([row._asdict() for row in table], folder / "accuracy.png")
    write_gallery(samples, folder / "answers.html")
    for name in ("accuracy.md", "accuracy.png", "answers.html"):
        reporter.artifact(folder / name, "report")
    reporter.metrics({f"accuracy/{row.label}": row.accuracy for row in table})


def write_comparison(
    rows: Sequence[ScoreRow], regressions: Sequence[ComparedSample], folder: Path, reporter: Reporter
) -> None:
    """``scores.md``, ``scores.json`` and ``regressions.html`` into ``folder``, kept with the run under ``report``.

    ``reporter`` also gets the drop of each task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "scores.md", score_table(rows).encode())
    columns, cells = score_columns(rows)
    write_json(folder / "scores.json", {"columns": columns, "data": cells})
    title = "Questions that the teacher answered right and the student wrong"
    write_gallery(regressions, folder / "regressions.html", title)
    reporter.table(folder / "scores.json", "report")
    for name in ("scores.md", "regressions.html"):
        reporter.artifact(folder / name, "report")
    reporter.metrics({f"drop/{row.task}": row.drop for row in rows if row.drop is not None})


def score_table(rows: Sequence[ScoreRow]) -> str:
    """Teacher and student side by side as Markdown, each score with its standard error."""
    head = "| task | metric | teacher | student | drop | % of the teacher's |\n|---|---|--:|--:|--:|--:|\n"
    lines = []
    for row in rows:
        both = [str(row.teacher or "-"), str(row.student or "-"), _points(row.drop), _points(row.drop_percent)]
        note = " (" + row.note.replace("|", "/").replace("\n", " ") + ")" if row.note else ""
        lines.append(f"| {row.task}{note} | {row.metric} | {' | '.join(both)} |\n")
    return head + "".join(lines)


def score_columns(rows: Sequence[ScoreRow]) -> tuple[list[str], list[list[Any]]]:
    """``score_table`` as column names and a list of JSON values for each row."""
    scored = ["teacher", "teacher_stderr", "student", "student_stderr", "drop", "drop_percent"]
    cells = []
    for row in rows:
        scores = [part for each in (row.teacher, row.student) for part in (each and each.value, each and each.stderr)]
        cells.append([row.task, row.metric, *scores, row.drop, row.drop_percent, row.note])
    return ["task", "metric", *scored, "note"], cells


def _points(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_profile(result: ProfileResult, folder: Path, reporter: Reporter) -> None:
    """``profile.md``, ``.json``, ``.csv`` and ``.png`` into ``folder``, kept with the run under ``report``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "profile.md", profile_table(result).encode())
    write_json(folder / "profile.json", result.model_dump(mode="json"))
    write_bytes(folder / "profile.csv", as_csv(result).encode())
    plots.speed_memory(result, folder / "profile.png")
    for name in ("profile.md", "profile.json", "profile.csv", "profile.png"):
        reporter.artifact(folder / name, "report")


def accuracy_table(table: Sequence[Row]) -> str:
    """The accuracy table as Markdown."""
    head = "| model | initialisation | updates | accuracy | of the teacher's | questions |\n|---|---|--:|--:|--:|--:|\n"
    return head + "".join(
        f"| {r.label} | {r.init} | {r.updates} | {r.accuracy:.2%} | {_percent(r.share)} | {r.num_questions:,} |\n"
        for r in table
    )


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.2%}"


def profile_table(result: ProfileResult) -> str:
    """Speed, gains and memory as Markdown, each model on each stack at each place."""
    parts = []
    for table in tables(result):
        head, *rows = (f"| {' | '.join(cells)} |\n" for cells in table.rows)
        ruler = f"|---|{'--:|' * (len(table.columns) - 1)}\n"
        parts.append(f"{table.title}:\n\n{head}{ruler}{''.join(rows)}\n")
    return "".join(parts) + f"{method(result)}.\n"


def headline(table: Sequence[Row], result: ProfileResult, student: str = "student") -> dict[str, float]:
    """What flow runs are compared by: accuracies, and ratios at the longest place at which there are any.

    The student's to the teacher, on one stack, and of its decoding speed the stack's to transformers'.
    """
    numbers = {f"accuracy/{row.label}": row.accuracy for row in table}
    numbers["share_of_teacher"] = next(row.share for row in table if row.label == student)
    layers = [row for row in compare(result) if (row.label, row.stack) == (student, result.stack)]
    stacks = [gain for gain in stack_gains(result) if gain.label == student]
    ratios = {
        "decode_speed_ratio": [(row.place, row.decode_speed) for row in layers],
        "prefill_speed_ratio": [(row.place, row.prefill_speed) for row in layers],
        "cache_ratio": [(row.place, row.cache_bytes) for row in layers],
        "stack_speed_ratio": [(gain.place, gain.decode_speed) for gain in stacks],
    }
    for name, found in ratios.items():
        known = [(sum(place[:2]), ratio) for place, ratio in found if ratio is not None]
        if known:
            numbers[name] = max(known, key=itemgetter(0))[1]
    return numbers


def write_gallery(
    samples: Sequence[ComparedSample], path: Path, title: str = "Teacher and student on the same questions"
) -> None:
    """One self-contained HTML page: each image with its question, the expected answer and both models' answers."""
    items = "".join(_figure(sample) for sample in samples)
    page = (
        "<!doctype html><meta charset='utf-8'><title>Answers</title><style>"
        "body{font:15px sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1.2em}"
        "figure{width:13em;margin:0;padding:.8em;border:1px solid #ccc;border-radius:6px}"
        "img{width:100%;image-rendering:pixelated}.right{color:#00734d}.wrong{color:#b03000}"
        f"</style><h1>{title}</h1><main>{items}</main>"
    )
    write_bytes(path, page.encode())


def _figure(sample: ComparedSample) -> str:
    def answer(name: str, text: str, right: bool) -> str:
        mark = "right" if right else "wrong"
        return f"<div class='{mark}'>{name}: {html.escape(text) or '(nothing)'} ({mark})</div>"

    data = f"data:image/png;base64,{base64.b64encode(sample.png).decode()}"
    image = f"<img alt='{html.escape(sample.id)}' src='{data}'>" if sample.png else "<div>(no image)</div>"
    return (
        f"<figure>{image}"
        f"<figcaption><b>{html.escape(sample.question)}</b><div>expected: {html.escape(sample.expected)}</div>"
        f"{answer('teacher', sample.teacher_answer, sample.teacher_right)}"
        f"{answer('student', sample.student_answer, sample.student_right)}</figcaption></figure>"
    )
