"""The promotion gate: decisions with their reasons, and what they do to a real model registry."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import free_port
from mlflow.tracking import MlflowClient

from matvlm.artifacts import EvalResult, TaskScore
from matvlm.config import Recipe
from matvlm.gate import Verdict, drop, judge
from matvlm.recipes import RecipeError, parse_recipe
from matvlm.storage import write_json
from matvlm.tracking import Tracker, resolve_checkpoint
from matvlm.tracking.store import open_client

TEACHER = {"gqa": 60.0, "pope": 90.0}


def recipe(tasks: list[str] | None = None, **thresholds: Any) -> Recipe:
    evaluate = {"tasks": tasks or list(TEACHER)}
    return Recipe.model_validate({"name": "gated", "evaluate": evaluate, "promote": thresholds})


@functools.cache
def samples_of(data: str) -> str:
    """The place of an evaluation's answers, with the record of what was asked beside it."""
    folder = Path(tempfile.mkdtemp())
    tasks = {task: {"identity": {"version": 1.0}, "data": {"sha256": task + data}} for task in (*TEACHER, "mmvet")}
    write_json(folder / "results.json", {"tasks": tasks})
    return str(folder / "samples.jsonl")


def result(scores: dict[str, float], failed: dict[str, str] | None = None, data: str = "all of it") -> EvalResult:
    return EvalResult(
        label="a model",
        checkpoint_uri="a folder",
        metrics={},
        num_questions=100,
        seconds=1.0,
        samples_uri=samples_of(data),
        scores={task: TaskScore(metric="accuracy", value=value) for task, value in scores.items()},
        failed=failed or {},
    )


def verdict_of(student: dict[str, float], **thresholds: Any) -> Verdict:
    return judge(recipe(**thresholds), result(TEACHER), result(student))


@pytest.mark.parametrize(
    ("thresholds", "student", "reasons"),
    [
        ({}, {"gqa": 1.0, "pope": 1.0}, []),
        # The teacher's mean is 75, so that 3 % of it are 2.25 points: 72.75 is the lowest mean that passes.
        ({"max_mean_drop": 3}, {"gqa": 58.0, "pope": 87.5}, []),
        ({"max_mean_drop": 3}, {"gqa": 57.9, "pope": 87.5}, ["the mean is 72.70, 3.07 % below the teacher's 75.00"]),
        ({"max_mean_drop": 0}, TEACHER, []),
        ({"max_mean_drop": 0}, {"gqa": 60.5, "pope": 90.0}, []),
        ({"min_score": 58}, {"gqa": 58.0, "pope": 60.0}, []),
        ({"min_score": 58}, {"gqa": 57.9, "pope": 90.0}, ["gqa is 57.90, below promote.min_score 58"]),
        ({"min_score": {"pope": 85}}, {"gqa": 1.0, "pope": 85.0}, []),
        ({"min_score": {"pope": 85}}, {"gqa": 99.0, "pope": 84.0}, ["pope is 84.00, below promote.min_score 85"]),
        ({"max_drop": 10}, {"gqa": 54.0, "pope": 81.0}, []),
        ({"max_drop": 10}, {"gqa": 53.0, "pope": 81.0}, ["gqa is 53.00, 11.67 % below the teacher's 60.00, more than"]),
        ({"max_drop": {"gqa": 10}}, {"gqa": 54.0, "pope": 1.0}, []),
        (
            {"max_mean_drop": 3, "max_drop": 5, "min_score": 70},
            {"gqa": 50.0, "pope": 80.0},
            [
                "gqa is 50.00, below",
                "gqa is 50.00, 16.67 % below",
                "pope is 80.00, 11.11 %",
                "the mean is 65.00, 13.33",
            ],
        ),
    ],
)
def test_thresholds(thresholds: dict[str, Any], student: dict[str, float], reasons: list[str]) -> None:
    verdict = verdict_of(student, **thresholds)
    assert verdict.passed == (not reasons)
    if reasons:
        assert len(verdict.reasons) == len(reasons)
        for said, wanted in zip(verdict.reasons, reasons, strict=True):
            assert said.startswith(wanted)
    else:
        assert verdict.reason.startswith("the mean of gqa, pope is ")
    assert verdict.scores == student
    assert (verdict.teacher_mean, verdict.mean) == (75.0, sum(student.values()) / 2)
    assert verdict.drop == pytest.approx(100 * (75.0 - sum(student.values()) / 2) / 75.0)


def test_what_was_not_measured_refuses() -> None:
    full = result(TEACHER)
    cases = [
        (
            full,
            result({"gqa": 60.0}, {"pope": "no images"}),
            "pope failed for the student: no images",
        ),
        (result({"gqa": 60.0}, {"pope": "no data"}), full, "pope failed for the teacher: no data"),
        (full, result({"gqa": 60.0}), "pope has no score for the student"),
        (full, result({"gqa": 60.0, "pope": float("nan")}), "pope has no score for the student"),
        (full, result({"gqa": 60.0, "pope": 90.0}).model_copy(update={"samples_uri": ""}), "gqa was not the same"),
        (full, result(TEACHER, data="some of it"), "gqa was not the same for teacher and student; pope was not"),
    ]
    for teacher, student, reason in cases:
        verdict = judge(recipe(), teacher, student)
        assert not verdict.passed
        assert verdict.reason.startswith(reason)
    assert judge(recipe(), full, result({"gqa": 60.0})).mean is None


def test_a_task_without_a_score_may_be_left_out() -> None:
    judged = Recipe.model_validate(
        {"name": "gated", "evaluate": {"tasks": ["gqa", "mmvet"]}, "promote": {"tasks": ["gqa"]}}
    )
    verdict = judge(judged, result({"gqa": 60.0}), result({"gqa": 59.0}, {"mmvet": "the judge is down"}))
    assert verdict.passed
    assert verdict.scores == {"gqa": 59.0}
    assert not judge(recipe(["gqa", "mmvet"]), result({"gqa": 60.0}), result({"gqa": 59.0})).passed


def test_a_teacher_at_nothing_is_not_fallen_below() -> None:
    assert drop(0.0, 0.0) == 0.0
    assert drop(50.0, 60.0) == pytest.approx(-20.0)


def test_only_the_same_measurement_compares() -> None:
    base = verdict_of(TEACHER).measured
    assert verdict_of({"gqa": 1.0, "pope": 2.0}, max_drop=5).measured == base
    few = result(TEACHER, data="some of it")
    assert judge(recipe(), few, few).measured != base
    assert judge(recipe(["gqa"]), result(TEACHER), result(TEACHER)).measured != base


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{max_mean_drop: -1}", "promote.max_mean_drop: Input should be greater than or equal to 0"),
        ("{max_mean_drop: 101}", "promote.max_mean_drop: Input should be less than or equal to 100"),
        ("{min_score: high}", "promote.min_score: Input should be a valid number"),
        ("{min_score: {easyvqa: high}}", "promote.min_score.easyvqa: Input should be a valid number"),
        ("{max_drop: {gqa: 3}}", "promote.max_drop names 'gqa', which is not in the tasks that count"),
        ("{tasks: [gqa]}", "promote.tasks names 'gqa', which is not in evaluate.tasks"),
        ("{mean: 3}", "promote.mean: unknown key"),
    ],
)
def test_thresholds_that_cannot_be_meant_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_recipe(f"name: x\npromote: {text}")
    assert complaint in str(error.value)
    assert len(str(error.value).splitlines()) == 1


class Registry:
    """Students of one run in a registry, each registered, judged, and looked up again."""

    def __init__(self, folder: Path, uri: str | None = None):
        self.tracker = Tracker("EvalFlow/1", folder / "runs" / "1", "matvlm", uri)
        self.client: MlflowClient = open_client(self.tracker.uri)
        self.tracker.parent({}, {})

    def add(self, verdict: Verdict, given: list[str]) -> dict[str, str]:
        """Judge a new student, which has to be given these aliases; returns its tags."""
        number = str(len(self.client.search_model_versions("name = 'matvlm'")) + 1)
        uri = f"s3://bucket/{number}"
        assert self.tracker.register("matvlm", uri, "student", {}) == number
        assert self.tracker.promote("matvlm", uri, verdict) == given
        return self.tags(number)

    def tags(self, number: str) -> dict[str, str]:
        return dict(self.client.get_model_version("matvlm", number).tags)

    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model("matvlm").aliases
        return {alias: str(number) for alias, number in found.items()}


def both_outcomes(registry: Registry) -> None:
    good, better, worse = ({"gqa": 59.0 + more, "pope": 89.0} for more in (0.0, 1.0, -20.0))
    tags = registry.add(verdict_of(good, max_mean_drop=3), ["candidate", "champion"])
    assert tags["gate"] == "passed"
    assert tags["gate.reason"].startswith("the mean of gqa, pope is 74.00, 1.33 % below the teacher's 75.00")
    assert (tags["gate.score.gqa"], tags["gate.mean"], tags["gate.teacher_mean"]) == ("59.0", "74.0", "75.0")
    assert tags["gate.recipe"] == "gated"
    assert tags["gate.time"].startswith("20")

    tags = registry.add(verdict_of(worse, max_mean_drop=3), [])
    assert tags["gate"] == "refused"
    assert (
        "the mean is 64.00, 14.67 % below the teacher's 75.00, more than promote.max_mean_drop 3 %"
        in tags["gate.reason"]
    )
    assert "gate.champion" not in tags
    assert registry.aliases() == {"candidate": "1", "champion": "1"}

    tags = registry.add(verdict_of(better, max_mean_drop=3), ["candidate", "champion"])
    assert tags["gate.champion"] == "its mean 74.50 is above the 74.00 of version 1"
    assert registry.add(verdict_of(good), ["candidate"])["gate.champion"].startswith("its mean 74.00 is not above")
    assert registry.aliases() == {"candidate": "4", "champion": "3"}


def test_both_outcomes_in_a_database(folder: Path) -> None:
    both_outcomes(Registry(folder))
    assert resolve_checkpoint("models:/matvlm@champion") == "s3://bucket/3"


def test_both_outcomes_on_a_server(folder: Path, serve: Callable[[int], Any]) -> None:
    port = free_port()
    serve(port)
    both_outcomes(Registry(folder, f"http://127.0.0.1:{port}"))


def test_champions_are_compared_on_the_same_measurement_only(folder: Path) -> None:
    registry = Registry(folder)
    registry.add(verdict_of({"gqa": 10.0, "pope": 10.0}), ["candidate", "champion"])
    few = result(TEACHER, data="some of it")
    limited = judge(recipe(), few, few)
    tags = registry.add(limited, ["candidate"])
    assert (
        "version 1 was not measured on the same tasks and data: evaluate models:/matvlm@champion"
        in tags["gate.champion"]
    )
    again = judge(recipe(), few, result({"gqa": 10.0, "pope": 10.0}, data="some of it"))
    assert registry.tracker.promote("matvlm", "s3://bucket/1", again) == ["candidate", "champion"]
    assert registry.tracker.promote("matvlm", "s3://bucket/2", limited, "2") == ["candidate", "champion"]


def test_a_new_verdict_replaces_the_old_one(folder: Path) -> None:
    registry = Registry(folder)
    registry.add(verdict_of(TEACHER), ["candidate", "champion"])
    failed = judge(recipe(), result(TEACHER), result({"pope": 90.0}, {"gqa": "the disk is full"}))
    assert registry.tracker.promote("matvlm", "s3://bucket/1", failed) == ["champion"]
    tags = registry.tags("1")
    assert tags["gate"] == "refused"
    assert "gqa failed for the student: the disk is full" in tags["gate.reason"]
    assert {name for name in tags if name.startswith("gate.")} == {
        *("gate.reason", "gate.recipe", "gate.measured", "gate.time", "gate.score.pope")
    }
    assert registry.aliases() == {"champion": "1"}


def test_what_was_never_registered_is_no_version(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(folder)
    assert registry.tracker.promote("matvlm", "s3://bucket/9", verdict_of(TEACHER)) is None
    assert "s3://bucket/9 is no version of the model 'matvlm'" in caplog.text
