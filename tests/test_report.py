"""Tables, headline and gallery from results written by hand."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_profile import point
from tiny_profile import result as result_of

from matvlm.artifacts import Checkpoint, EvalResult, ProfileResult, TaskScore
from matvlm.evaluate import ComparedSample, ScoreRow
from matvlm.profiling.tables import as_csv
from matvlm.report import (
    accuracy_table,
    common_task,
    headline,
    profile_table,
    rows,
    score_table,
    write_accuracy,
    write_comparison,
    write_gallery,
    write_profile,
)
from matvlm.reporting import Reporter, Reporters
from matvlm.tracking import Tracker, sync

CHECKPOINTS = [
    Checkpoint(uri="t", label="teacher"),
    Checkpoint(uri="s", label="student", init="aligned", layers=[0], updates=120),
    Checkpoint(uri="u", label="student, untrained", init="aligned", layers=[0]),
]


def result(label: str, accuracy: float, questions: int = 2000, **kinds: float) -> EvalResult:
    metrics = {"easyvqa/accuracy": accuracy, "other/accuracy": 0.25} | {
        f"easyvqa/accuracy_{kind}": value for kind, value in kinds.items()
    }
    both = {"easyvqa": accuracy, "other": 0.25}
    scores = {task: TaskScore(metric="accuracy", value=100 * value) for task, value in both.items()}
    return EvalResult(
        label=label,
        checkpoint_uri="",
        metrics=metrics,
        num_questions=questions,
        seconds=1.0,
        samples_uri="",
        scores=scores,
    )


RESULTS = [
    result("teacher", 0.8, color=0.9, shape=0.7),
    result("student", 0.78, color=0.88),
    result("student, untrained", 0.2, 500),
]
SAMPLE = ComparedSample(
    id="<7>",
    question="is it <b>red</b> & 'round'?",
    expected="yes",
    teacher_answer="yes",
    student_answer="",
    teacher_right=True,
    student_right=False,
    png=b"\x89PNG picture",
)


PROFILE = result_of(
    point("teacher", prompt=1024, prefill=[0.4] * 3, kv=4095 * 1024),
    point("teacher", prompt=64, prefill=[0.1] * 3, decode=[80.0] * 3, kv=1023 * 1024),
    point("teacher", "hf", prompt=1024, decode=[25.0] * 3),
    point("teacher", "hf", prompt=64, decode=[20.0] * 3),
    point("student", prompt=1024, prefill=[0.2] * 3, decode=[75.0] * 3, kv=3071 * 1024),
    point("student", prompt=64, prefill=[0.2] * 3, decode=[40.0] * 3, kv=2047 * 1024),
    point("student", "hf", prompt=1024, decode=[30.0] * 3),
    point("student", "hf", prompt=64, decode=[8.0] * 3),
)


class Kept(Reporter):
    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.files: list[tuple[str, str]] = []

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.values |= values

    def artifact(self, path: Path, folder: str = "") -> None:
        assert path.stat().st_size
        self.files.append((folder, path.name))

    def table(self, path: Path, folder: str = "") -> None:
        self.artifact(path, folder)


def test_each_model_is_measured_by_the_teacher() -> None:
    teacher, student, untrained = rows(CHECKPOINTS, RESULTS, "easyvqa")
    assert [row.share for row in (teacher, student, untrained)] == pytest.approx([1.0, 0.975, 0.25])
    assert [row.accuracy for row in (teacher, student, untrained)] == [0.8, 0.78, 0.2]
    assert (teacher.init, teacher.updates) == ("-", 0)
    assert (student.init, student.updates, student.kinds) == ("aligned", 120, {"color": 0.88})
    assert teacher.kinds == {"color": 0.9, "shape": 0.7}
    assert untrained.num_questions == 500
    assert [row.accuracy for row in rows(CHECKPOINTS, RESULTS, "other")] == [0.25] * 3
    last = rows(CHECKPOINTS[::-1], RESULTS[::-1], "easyvqa")
    assert last == [untrained, student, teacher], "the teacher may stand anywhere"


def scored(label: str, failed: dict[str, str] | None = None, **values: float) -> EvalResult:
    scores = {task: TaskScore(metric="f1", value=value) for task, value in values.items()}
    return result(label, 0.5).model_copy(update={"scores": scores, "failed": failed or {}})


def test_models_are_ranked_by_the_first_task_that_all_have_a_score_of() -> None:
    results = [
        scored("teacher", pope=87.2, mme=73.0, easyvqa=99.0),
        scored("student", {"easyvqa": "disk full"}, mme=71.5, pope=84.0),
    ]
    assert common_task(["easyvqa", "mme", "pope"], results) == "mme"
    teacher, student = rows(CHECKPOINTS[:2], results, "mme")
    assert (teacher.accuracy, student.accuracy) == (0.73, 0.715)
    assert student.share == pytest.approx(71.5 / 73)
    with pytest.raises(ValueError, match=r"no task has a score for every model \(student, easyvqa: disk full\)"):
        common_task(["easyvqa"], results)
    with pytest.raises(ValueError, match="student has no score of gqa: nothing failed"):
        rows(CHECKPOINTS[:2], [scored("teacher", gqa=1.0), results[1]], "gqa")


def test_a_teacher_that_knows_nothing_measures_nothing() -> None:
    table = rows(CHECKPOINTS[:2], [result("teacher", 0.0), RESULTS[1]], "easyvqa")
    assert all(math.isnan(row.share) for row in table)
    assert "| 78.00% | - |" in accuracy_table(table)


def test_results_of_other_models_are_refused() -> None:
    for checkpoints, results in (
        (CHECKPOINTS[:2], RESULTS[1::-1]),
        (CHECKPOINTS[:2], RESULTS),
        (CHECKPOINTS[1:], RESULTS[1:]),
    ):
        with pytest.raises(ValueError, match=r"results of \[.*\] do not fit the models \[.*\], one of them 'teacher'"):
            rows(checkpoints, results, "easyvqa")


def test_tables_as_markdown() -> None:
    accuracy = accuracy_table(rows(CHECKPOINTS, RESULTS, "easyvqa")).splitlines()
    assert accuracy[2:] == [
        "| teacher | - | 0 | 80.00% | 100.00% | 2,000 |",
        "| student | aligned | 120 | 78.00% | 97.50% | 2,000 |",
        "| student, untrained | aligned | 0 | 20.00% | 25.00% | 500 |",
    ]
    assert len({line.count("|") for line in accuracy}) == 1, "as many cells in each line"


def test_the_profile_as_markdown() -> None:
    text = profile_table(PROFILE)
    assert "| teacher | engine | 1,024 | 400 (400 to 400) | 200 (200 to 200) | 50 (50 to 50) | 1,000 | 5% |" in text
    assert "| student | 1,024 | hf | 1.00 x | 2.50 x | 2.00 x | 1.50 x | 1.00 x | 0.75 x |" in text
    assert "| student | 64 | hf | 1.00 x | 5.00 x | 0.50 x | 0.50 x | 1.00 x | 2.00 x |" in text
    for title, lines in (("Speed", 10), ("Gains", 6), ("Memory", 10)):
        table = text.partition(f"{title}:\n\n")[2].partition("\n\n")[0].splitlines()
        assert len(table) == lines
        assert len({line.count("|") for line in table}) == 1, "as many cells in each line"
    assert text.splitlines()[-1].startswith("batch 1, 4 new tokens, medians (lowest to highest)")


def test_the_headline_is_the_student_at_the_longest_context() -> None:
    assert headline(rows(CHECKPOINTS, RESULTS, "easyvqa"), PROFILE) == pytest.approx(
        {
            "accuracy/teacher": 0.8,
            "accuracy/student": 0.78,
            "accuracy/student, untrained": 0.2,
            "share_of_teacher": 0.975,
            "decode_speed_ratio": 1.5,
            "prefill_speed_ratio": 2.0,
            "cache_ratio": 0.75,
            "stack_speed_ratio": 2.5,
        }
    )


def test_the_headline_takes_the_longest_place_that_there_is_memory_for() -> None:
    points = [
        point("teacher", prompt=64, decode=[40.0] * 3),
        point("teacher", prompt=1024, out_of_memory=True),
        point("student", prompt=64, decode=[60.0] * 3),
        point("student", prompt=1024),
    ]
    assert headline(rows(CHECKPOINTS, RESULTS, "easyvqa"), result_of(*points))["decode_speed_ratio"] == 1.5
    nothing = [p.model_copy(update={"measured": None}) for p in points]
    assert "decode_speed_ratio" not in headline(rows(CHECKPOINTS, RESULTS, "easyvqa"), result_of(*nothing))


def test_the_gallery_shows_pictures_and_both_answers_and_needs_nothing_else(tmp_path: Path) -> None:
    write_gallery([SAMPLE, SAMPLE], tmp_path / "answers.html")
    page = (tmp_path / "answers.html").read_text()
    assert page.count("<figure>") == page.count("</figure>") == 2
    assert "<b>is it &lt;b&gt;red&lt;/b&gt; &amp; &#x27;round&#x27;?</b>" in page, "text stays text"
    assert "alt='&lt;7&gt;'" in page
    pictures = re.findall(r"src='data:image/png;base64,([^']*)'", page)
    assert [base64.b64decode(picture) for picture in pictures] == [SAMPLE.png] * 2
    assert "<div class='right'>teacher: yes (right)</div>" in page
    assert "<div class='wrong'>student: (nothing) (wrong)</div>" in page
    assert "expected: yes" in html.unescape(page)
    assert "http" not in page


def test_reports_are_written_and_kept_with_the_run(tmp_path: Path) -> None:
    kept = Kept()
    table = rows(CHECKPOINTS, RESULTS, "easyvqa")
    write_accuracy(table, [SAMPLE], tmp_path / "new" / "report", kept)
    write_profile(PROFILE, tmp_path / "new" / "report", kept)
    names = ["accuracy.md", "accuracy.png", "answers.html", "profile.md", "profile.json", "profile.csv"]
    names.append("profile.png")
    assert kept.files == [("report", name) for name in names]
    assert kept.values == {
        "accuracy/teacher": 0.8,
        "accuracy/student": 0.78,
        "accuracy/student, untrained": 0.2,
    }
    folder = tmp_path / "new" / "report"
    assert (folder / "accuracy.md").read_text() == accuracy_table(table)
    assert (folder / "profile.md").read_text() == profile_table(PROFILE)
    assert (folder / "profile.csv").read_text() == as_csv(PROFILE)
    assert ProfileResult.model_validate(json.loads((folder / "profile.json").read_text())) == PROFILE


SCORES = [
    ScoreRow(
        "pope", "f1", TaskScore(metric="f1", value=87.2, stderr=0.41), TaskScore(metric="f1", value=84.0), 3.2, 3.67
    ),
    ScoreRow("gqa", "accuracy", TaskScore(metric="accuracy", value=62.1), None, None, None, "student failed: a|b"),
]


def test_scores_as_markdown() -> None:
    assert score_table(SCORES).splitlines()[2:] == [
        "| pope | f1 | 87.20 ± 0.41 | 84.00 | 3.20 | 3.67 |",
        "| gqa (student failed: a/b) | accuracy | 62.10 | - | - | - |",
    ]


def test_the_comparison_is_kept_also_as_a_table_of_mlflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``folder``: with an empty MLflow database."""
    import mlflow

    kept, tracker = Kept(), Tracker("run", folder / "run", "experiment")
    tracker.parent({}, {})
    with tracker.step("compare") as step:
        write_comparison(SCORES, [SAMPLE], folder / "report", Reporters(step, kept))
    assert kept.files == [("report", name) for name in ("scores.json", "scores.md", "regressions.html")]
    assert kept.values == {"drop/pope": 3.2}
    assert "teacher answered right and the student wrong" in (folder / "report" / "regressions.html").read_text()
    sync(folder / "run")  # what MLflow was too slow for while the run went on
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("experiment").experiment_id
    table = client.load_table(experiment, "report/scores.json")
    assert list(table["task"]) == ["pope", "gqa"]
    assert list(table["teacher"]) == [87.2, 62.1]
    assert table["teacher_stderr"][0] == pytest.approx(0.41)
    assert math.isnan(table["student"][1])
    assert table["note"][1] == "student failed: a|b"


def test_an_answer_without_its_image_is_shown_all_the_same(tmp_path: Path) -> None:
    write_gallery([dataclasses.replace(SAMPLE, png=b"")], tmp_path / "answers.html")
    page = (tmp_path / "answers.html").read_text()
    assert "<img" not in page
    assert "teacher: yes (right)" in page
