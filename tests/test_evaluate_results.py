"""What an evaluation leaves: scores on the scale of papers, a record of every question, answers that are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
import tiny_evaluation
from pydantic import ValidationError

from matvlm.artifacts import Checkpoint, EvalResult
from matvlm.config import TASKS, Evaluate
from matvlm.evaluate import (
    EvaluationError,
    evaluate,
    merge,
    read_result,
    running,
    tasks,
)
from matvlm.evaluate.answers import PREFIX
from matvlm.evaluate.results import RESULTS, SAMPLES
from matvlm.reporting import Reporter


class Kept(Reporter):
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.files: list[tuple[str, str]] = []
        self.last = (0, 0)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.seen |= values

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append((folder, path.name))

    def progress(self, done: int, total: int) -> None:
        self.last = (done, total)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Checkpoint]:
    """An untrained teacher and a hybrid of it, on disk."""
    folder = tmp_path_factory.mktemp("models")
    return [
        tiny_evaluation.save(folder / "teacher", "teacher"),
        tiny_evaluation.save(folder / "student", "student", (0, 2)),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small data set of every benchmark."""
    folder = tmp_path_factory.mktemp("data")
    return {name: str(benchmark_data.write(name, folder / name)) for name in benchmark_data.TASKS}


@pytest.fixture(scope="module")
def everything(
    models: list[Checkpoint], data: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[EvalResult, Kept]]:
    """Teacher and student on all benchmarks."""
    found = {}
    for model in models:
        reporter = Kept()
        settings = Evaluate(tasks=list(TASKS), data=data, batch_size=16)
        out = tmp_path_factory.mktemp("evaluation") / model.label
        found[model.label] = evaluate(model, settings, 20, out, reporter), reporter
    return found


def rows_of(uri: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(uri).read_text().splitlines()]


def test_the_recipe_knows_the_tasks_there_are() -> None:
    assert TASKS == tasks.NAMES
    for wrong in ({"tasks": ["mme", "mmee"]}, {"data": {"mmee": "x"}}):
        with pytest.raises(ValidationError, match="unknown task 'mmee'; known are easyvqa, easyvqa_sentence, gqa"):
            Evaluate.model_validate(wrong)
    with pytest.raises(ValidationError):
        Evaluate(tasks=[])


@pytest.mark.parametrize("label", ["teacher", "student"])
def test_every_task_is_scored_on_the_scale_of_papers(everything: Any, label: str) -> None:
    result, reporter = everything[label]
    assert result.failed == {}
    unscored = {"mmbench_en_test", "mmvet", "python_docs", "vqav2_testdev"}
    assert set(result.scores) == set(TASKS) - unscored
    for name, score in result.scores.items():
        root = record_of(result, name)["data"]["root"]
        metadata = tasks.build([name], {name: root} if root else {})[name].config.metadata
        assert score.metric == metadata["score"]
        assert score.value == pytest.approx(result.metrics[f"{name}/{score.metric}"] * metadata["scale"])
        assert 0 <= score.value <= 100
        assert score.stderr is None or 0 <= score.stderr <= 100
        assert reporter.seen[f"score/{name}"] == score.value
    assert result.mean_score == pytest.approx(sum(score.value for score in result.scores.values()) / 11)
    assert reporter.seen["score/mean"] == result.mean_score
    assert result.metrics.items() <= reporter.seen.items()
    assert all(math.isfinite(value) for value in result.metrics.values())


def record_of(result: EvalResult, task: str) -> dict[str, Any]:
    return json.loads((Path(result.samples_uri).parent / task / RESULTS).read_text())


def test_every_question_is_written_down(everything: Any) -> None:
    result, reporter = everything["student"]
    out = Path(result.samples_uri).parent
    rows = rows_of(result.samples_uri)
    assert result.num_questions == len(rows) == sum(len(rows_of(out / name / SAMPLES)) for name in TASKS)
    assert [row["task"] for row in rows] == sorted(row["task"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert {"task", "id", "number", "image_id", "question", "target", "answer", "score", "right"} == set(row)
        assert row["right"] in (True, False, None)
        assert row["score"] is None or 0 <= row["score"] <= 1
    unknown = {"mmbench_en_test", "mmvet", "python_docs", "vqav2_testdev"}
    assert {row["task"] for row in rows if row["right"] is None} == unknown
    easy = [row for row in rows if row["task"] == "easyvqa"]
    assert result.metrics["easyvqa/accuracy"] == sum(row["right"] for row in easy) / 20
    uploads = {name.removeprefix("submissions/") for name, _ in reporter.files if name.startswith("submissions/")}
    assert uploads == set(tasks.SUBMISSIONS)
    assert reporter.files[:2] == [("evaluation", SAMPLES), ("evaluation", RESULTS)]
    assert reporter.last == (len(rows_of(out / "vqav2_val" / SAMPLES)),) * 2


def test_where_a_result_comes_from_is_written_down(everything: Any, data: dict[str, str]) -> None:
    records = {label: record_of(everything[label][0], "pope") for label in ("teacher", "student")}
    record = records["student"]
    assert record["data"]["root"] == data["pope"]
    assert records["teacher"]["data"] == record["data"]
    assert records["teacher"]["identity"]["model"] != record["identity"]["model"]
    assert set(record["identity"]) == {
        "task",
        "version",
        "model",
        "limit",
        "matvlm",
        "lm_eval",
        "transformers",
        "torch",
    }
    assert record["questions"] == {"asked": 8, "of": 8}
    assert record["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "standard_error": 0}
    result = everything["student"][0]
    assert read_result(Path(result.samples_uri).parent) == result
    written = json.loads((Path(result.samples_uri).parent / RESULTS).read_text())
    assert written["tasks"]["pope"] == record


def evaluate_pope(model: Checkpoint, root: Path, out: Path, limit: int | None = None) -> tuple[EvalResult, int]:
    """The result, and how many answers it took from the model."""
    kept = out / "pope" / f"{PREFIX}0.jsonl"
    before = kept.read_text().splitlines() if kept.exists() else []
    result = evaluate(model, Evaluate(tasks=["pope"], data={"pope": str(root)}), limit, out, Reporter())
    lines = kept.read_text().splitlines()
    new = lines[max(len(before), 1) :] if lines[: len(before)] == before else lines[1:]
    return result, sum(len(json.loads(line)["answers"]) for line in new)


def test_only_answers_of_the_same_model_to_the_same_question_are_kept(models: list[Checkpoint], tmp_path: Path) -> None:
    teacher, student = models
    root = benchmark_data.write("pope", tmp_path / "data", "original")
    fresh, asked = evaluate_pope(teacher, root, tmp_path / "fresh")
    assert asked == 6, "two of the 8 questions are in two splits"
    of_student, _ = evaluate_pope(student, root, tmp_path / "out")
    again, asked = evaluate_pope(teacher, root, tmp_path / "out")
    assert asked == 6, "the student's answers are not the teacher's"
    assert (again.metrics, again.scores) == (fresh.metrics, fresh.scores)
    assert evaluate_pope(teacher, root, tmp_path / "out")[1] == 0
    assert evaluate_pope(teacher, root, tmp_path / "out", limit=4)[1] > 0, "another choice is another evaluation"
    moved = shutil.copytree(teacher.uri, tmp_path / "moved")
    hashes = {record_of(result, "pope")["identity"]["model"] for result in (fresh, again)}
    elsewhere, _ = evaluate_pope(Checkpoint(uri=str(moved), label="teacher"), root, tmp_path / "elsewhere")
    assert hashes == {record_of(elsewhere, "pope")["identity"]["model"]}, "a model is known by what it is"
    assert of_student.samples_uri == again.samples_uri


def test_a_changed_image_is_asked_about_again(models: list[Checkpoint], tmp_path: Path) -> None:
    root = benchmark_data.write("pope", tmp_path / "data", "original")
    before, _ = evaluate_pope(models[0], root, tmp_path / "out")
    hash_before = record_of(before, "pope")["data"]["sha256"]
    image = sorted(root.rglob("*.jpg"))[0]
    image.write_bytes(benchmark_data.picture(4711))
    after, asked = evaluate_pope(models[0], root, tmp_path / "out")
    rows = rows_of(before.samples_uri)
    assert 0 < asked == len({row["question"] for row in rows if str(row["image_id"]) in image.name}) < 6
    assert record_of(after, "pope")["data"]["sha256"] != hash_before


def test_images_that_cannot_be_decoded_are_named_and_too_many_refused(
    models: list[Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = benchmark_data.write("pope", tmp_path / "data", "original")
    content = bytearray(benchmark_data.picture(1, "PNG"))
    content[200:400] = bytes(200)  # between a header and an end that are as they should be
    broken = sorted(root.rglob("*.jpg"))[0]
    broken.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"images of \d of 8 questions cannot be read, more than 1%: pope-"):
        evaluate_pope(models[0], root, tmp_path / "out")
    monkeypatch.setattr(running, "UNREADABLE_SHARE", 0.9)
    result, _ = evaluate_pope(models[0], root, tmp_path / "out")
    rows = {row["id"]: row for row in rows_of(result.samples_uri)}
    unreadable = record_of(result, "pope")["unreadable"]
    assert set(unreadable) == {id for id, row in rows.items() if str(row["image_id"]) in broken.name}
    assert all(rows[id]["answer"] == "" for id in unreadable)


def test_a_task_that_fails_does_not_lose_the_others(models: list[Checkpoint], tmp_path: Path) -> None:
    settings = Evaluate(tasks=["pope", "easyvqa", "mme"], data={"pope": str(tmp_path), "mme": str(tmp_path / "absent")})
    result = evaluate(models[0], settings, 4, tmp_path / "out", Reporter())
    assert set(result.scores) == {"easyvqa"}
    assert set(result.failed) == {"pope", "mme"}
    assert "no such folder" in result.failed["mme"]
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["failed"] == result.failed
    with pytest.raises(EvaluationError, match=r"no task could be evaluated: pope: .*; mme: ") as failure:
        evaluate(models[0], settings.model_copy(update={"tasks": ["pope", "mme"]}), 4, tmp_path / "none", Reporter())
    assert failure.value.failed == result.failed


def test_unusable_checkpoints_are_one_clear_error(models: list[Checkpoint], tmp_path: Path) -> None:
    def refused(uri: Path, match: str) -> None:
        with pytest.raises(EvaluationError, match=match):
            evaluate(Checkpoint(uri=str(uri), label="x"), Evaluate(), 4, tmp_path / "out", Reporter())

    refused(tmp_path / "absent", "absent: cannot open")
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(models[0].uri).iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:2000] if file.suffix == ".safetensors" else content)
    refused(cut, "cut: cannot open")
    (cut / "config.json").write_text("{")
    refused(cut, "cut: cannot open")
    assert not (tmp_path / "out").exists()


def test_merged_results_of_single_tasks_are_those_of_all(
    models: list[Checkpoint], data: dict[str, str], tmp_path: Path
) -> None:
    names = ["pope", "gqa", "easyvqa"]
    whole = evaluate(models[1], Evaluate(tasks=names, data=data), 6, tmp_path / "whole", Reporter())
    parts = [evaluate(models[1], Evaluate(tasks=[name], data=data), 6, tmp_path / name, Reporter()) for name in names]
    failed = parts[0].model_copy(
        update={"failed": {"mme": "no data"}, "samples_uri": "", "metrics": {}, "scores": {}, "num_questions": 0}
    )
    joined = merge([*parts, failed], tmp_path / "joined")
    assert joined.model_dump(exclude={"seconds", "samples_uri", "failed"}) == whole.model_dump(
        exclude={"seconds", "samples_uri", "failed"}
    )
    assert joined.failed == {"mme": "no data"}
    assert Path(joined.samples_uri).read_bytes() == Path(whole.samples_uri).read_bytes()
    assert read_result(tmp_path / "joined") == joined
    for results, message in (
        ([], "none"),
        ([parts[0], parts[1].model_copy(update={"label": "other"})], "of one checkpoint"),
        ([parts[0], parts[0]], "pope are there twice"),
        ([failed], "no task could be evaluated: mme: no data"),
    ):
        with pytest.raises(EvaluationError, match=message):
            merge(results, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
