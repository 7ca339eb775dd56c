"""Teacher and student side by side, and how sure a score is."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.metrics import mean, mean_stderr
from PIL import Image

from matvlm.artifacts import EvalResult, TaskScore
from matvlm.evaluate import ScoreRow, compare, compare_samples, worst_regressions
from matvlm.evaluate.scores import standard_error
from matvlm.evaluate.tasks.pope import scorer as pope


def result(label: str, failed: dict[str, str] | None = None, **scores: float) -> EvalResult:
    return EvalResult(
        label=label,
        checkpoint_uri=label,
        metrics={},
        num_questions=9,
        seconds=1.0,
        samples_uri="",
        scores={task: TaskScore(metric="accuracy", value=value, stderr=0.5) for task, value in scores.items()},
        failed=failed or {},
    )


def test_scores_stand_side_by_side_with_the_drop_of_each_task() -> None:
    teacher = result("teacher", pope=80.0, gqa=60.0, mme=0.0)
    student = result("student", {"vqav2_val": "no data"}, gqa=57.0, pope=84.0, mme=10.0, textvqa=50.0)
    rows = {row.task: row for row in compare(teacher, student)}
    assert list(rows) == ["pope", "gqa", "mme", "textvqa", "vqav2_val", "mean"]
    assert [(rows[task].drop, rows[task].drop_percent) for task in ("pope", "gqa", "mme")] == [
        (-4.0, -5.0),
        (3.0, 5.0),
        (-10.0, None),
    ]
    assert rows["gqa"].teacher == TaskScore(metric="accuracy", value=60.0, stderr=0.5)
    assert rows["textvqa"] == ScoreRow("textvqa", "accuracy", None, student.scores["textvqa"], None, None)
    assert (rows["vqav2_val"].drop, rows["vqav2_val"].note) == (None, "student failed: no data")
    average = rows["mean"]
    assert average.teacher
    assert average.student
    assert (average.teacher.value, average.student.value) == (pytest.approx(140 / 3), pytest.approx(151 / 3))
    assert average.drop == pytest.approx(-11 / 3)
    assert [row.task for row in compare(result("teacher", gqa=1.0), result("student", gqa=1.0))] == ["gqa"]
    assert compare(result("teacher"), result("student")) == []


def test_the_papers_mean_is_over_tasks_with_a_score() -> None:
    assert result("teacher", pope=80.0, mme=70.0).mean_score == 75.0
    assert result("teacher").mean_score is None


def sample(number: int, value: Any, image: str | None = None) -> dict[str, Any]:
    return {"doc": {"image_id": image or str(number)}, "doc_id": number, "m": value}


def test_the_error_of_a_mean_is_lm_evals_and_that_of_anything_else_agrees_with_it() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(40)]
    samples = [sample(number, value) for number, value in enumerate(values)]
    assert standard_error(mean, "m", samples) == pytest.approx(mean_stderr(values))
    assert standard_error(lambda items: sum(items) / len(items), "m", samples) == pytest.approx(mean_stderr(values))
    assert standard_error(mean, "m", samples[:1]) is None
    assert standard_error(lambda items: float("nan"), "m", samples) is None
    assert standard_error(mean, "other", samples) is None


def test_questions_about_one_image_do_not_count_as_independent() -> None:
    draw = random.Random(0)
    values = [draw.random() for _ in range(40)]
    once = [sample(number, value) for number, value in enumerate(values)]
    twice = [sample(2 * number + k, value, str(number)) for number, value in enumerate(values) for k in range(2)]
    average = lambda items: sum(items) / len(items)  # noqa: E731
    assert standard_error(average, "m", twice) == pytest.approx(standard_error(average, "m", once))
    assert standard_error(average, "m", twice) > 1.3 * mean_stderr([s["m"] for s in twice])


def test_the_error_of_popes_f1_is_that_of_drawing_again() -> None:
    draw = random.Random(1)
    judged = [
        pope.Judged(draw.choice(pope.SPLITS), expected, expected if draw.random() < 0.8 else not expected)
        for expected in (draw.random() < 0.5 for _ in range(1500))
    ]
    samples = [sample(number, value) for number, value in enumerate(judged)]
    drawn = [pope.f1([draw.choice(judged) for _ in judged]) for _ in range(200)]
    middle = mean(drawn)
    reference = (sum((value - middle) ** 2 for value in drawn) / len(drawn)) ** 0.5
    # Both are estimates, 50 parts and 200 draws; measured: they differ by at most 17 % over 5 seeds.
    assert standard_error(pope.f1, "m", samples) == pytest.approx(reference, rel=0.25)


def sample_file(path: Path, answers: dict[int, str], scores: dict[int, float] | None = None) -> str:
    rows = [
        {
            "task": "easyvqa",
            "id": f"easyvqa-{n}",
            "number": n,
            "image_id": str(n),
            "question": "what?",
            "target": "teal",
        }
        | {"answer": answer, "right": answer == "teal", "score": (scores or {}).get(n, float(answer == "teal"))}
        for n, answer in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compared_samples_show_differences_and_agreement(tmp_path: Path) -> None:
    teacher = sample_file(tmp_path / "teacher.jsonl", dict.fromkeys(range(60), "teal"))
    answers = {n: "gray" if n % 10 == 0 else "teal" for n in range(40)}
    student = sample_file(tmp_path / "student.jsonl", answers)
    shown = compare_samples(teacher, student, n=6, seed=1)
    assert len(shown) == 6
    assert {s.id for s in shown} <= {f"easyvqa-{n}" for n in range(40)}
    differing = [s for s in shown if not s.student_right]
    assert [(s.teacher_answer, s.student_answer) for s in differing] == [("teal", "gray")] * 3
    assert Image.open(io.BytesIO(shown[0].png)).size == (64, 64)
    assert shown == compare_samples(teacher, student, n=6, seed=1)
    assert shown != compare_samples(teacher, student, n=6, seed=2)
    assert len(compare_samples(teacher, teacher, n=6, seed=1)) == 6
    assert len(compare_samples(teacher, student, n=100, seed=1)) == 40


def test_regressions_are_what_the_teacher_knew_and_the_student_does_not(tmp_path: Path) -> None:
    """Of 20 questions the teacher has 0 to 9 right; the student has lost 0, 2, 4, 6, 8 of those, 4 only in part."""
    teacher = sample_file(tmp_path / "teacher.jsonl", {n: "teal" if n < 10 else "gray" for n in range(20)})
    said = {n: "teal" if n % 2 or n >= 10 else "gray" for n in range(20)}
    student = sample_file(tmp_path / "student.jsonl", said, {4: 0.3})
    shown = worst_regressions(teacher, student, n=9, seed=1)
    assert {s.id for s in shown} == {f"easyvqa-{n}" for n in (0, 2, 4, 6, 8)}
    assert shown[-1].id == "easyvqa-4"
    assert all(s.teacher_right and not s.student_right and s.task == "easyvqa" and s.png for s in shown)
    assert [s.id for s in worst_regressions(teacher, student, n=2, seed=1)] == [s.id for s in shown[:2]]


def test_an_image_that_is_gone_is_left_out(tmp_path: Path) -> None:
    rows = [{"task": "pope", "id": "1", "number": 0, "question": "?", "target": "yes", "score": 1.0, "right": True}]
    for name in ("teacher", "student"):
        text = json.dumps({**rows[0], "answer": name, "right": name == "teacher", "score": float(name == "teacher")})
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
    records = {"tasks": {"pope": {"data": {"root": str(tmp_path / "gone"), "hub_org": "lmms-lab"}}}}
    (tmp_path / "results.json").write_text(json.dumps(records))
    (shown,) = worst_regressions(str(tmp_path / "teacher.jsonl"), str(tmp_path / "student.jsonl"), n=3, seed=0)
    assert (shown.teacher_answer, shown.student_answer, shown.png) == ("teacher", "student", b"")
