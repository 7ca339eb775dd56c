"""A sweep as a user runs it, with a point that fails, killed in the middle of another one's distillation, continued."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from flow_tools import DEBUG, FlowProcess, Store, run_flow, run_folder

from matvlm.recipes import load_recipe
from matvlm.sweep import PointResult, Summary
from matvlm.tracking import flatten

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEP = {
    "name": "study",
    "recipe": str(DEBUG),
    "set": {
        "distill.validation": {"samples": 6, "every_updates": 3},
        "evaluate.limit": 12,
        "profile": {"prompts": [16], "new_tokens": [2], "repeats": 1},
    },
    "keep_models": False,
    "reference": "fine",
    "points": {
        "broken": {"set": {"distill.optimizer.lr": 1e30, "distill.max_skipped_updates": 0}},
        "fine": {"seeds": [0, 1]},
        "warm": {"set": {"distill.loss.temperature": 2.0}},
    },
}
KEYS = ["broken-0", "fine-0", "fine-1", "warm-0"]


class Story(NamedTuple):
    folder: Path
    killed: str
    """What it had printed when it was killed."""
    continued: str
    runs: dict[str, Any]
    """Of MLflow, by step."""

    @property
    def place(self) -> Path:
        return run_folder(self.folder)

    @property
    def summary(self) -> Summary:
        return Summary.model_validate_json((self.place / "report" / "summary.json").read_text())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    flow = FlowProcess(folder, "--config", "recipe", "sweep.yaml", "run", flow="sweep_flow.py")
    flow.wait_until(lambda: any(folder.glob("runs/*/points/fine-0/snapshots/update-*")))
    flow.kill()
    (command,) = re.findall(r"python flows/sweep_flow\.py (resume .*)", flow.output)
    assert command.endswith(" --max-workers 1")
    code, output = run_flow(folder, *command.split(), flow="sweep_flow.py", log="again.txt")
    assert code == 0, output
    return Story(folder, flow.output, output, Store(folder).runs(run_folder(folder).name))


def result_of(story: Story, name: str, seed: int = 0) -> PointResult:
    (found,) = [point for point in story.summary.points if (point.name, point.seed) == (name, seed)]
    return found


def test_a_point_that_fails_is_told_and_stops_no_other_one(story: Story) -> None:
    assert [f"{point.name}-{point.seed}" for point in story.summary.points] == KEYS
    error = result_of(story, "broken").error
    assert error is not None
    assert "not finite" in error
    assert all(result_of(story, *other).error is None for other in (("fine", 0), ("fine", 1), ("warm", 0)))
    assert f"broken-0 failed: {error}" in story.continued
    (row,) = [line for line in story.continued.splitlines() if "| broken |" in line]
    assert error.replace("|", "/") in row
    assert story.runs["broken[0]"].info.status == "FAILED"
    assert Store(story.folder).artifacts(story.runs["broken[0]"]) == {"error.txt"}
    assert story.runs[""].data.metrics["failed_points"] == 1


def test_only_what_was_missing_is_done_again(story: Story) -> None:
    started = [
        re.findall(r"\d/(\w+)/\d+ \(pid \d+\)\] Task is starting", text) for text in (story.killed, story.continued)
    ]
    before = ["start", "prepare_data", "teacher_targets", "teacher_targets", "join_targets", "list_points"]
    assert started[0] == [*before, "point", "point", "point"]
    assert started[1] == ["point", "point", "point", "join_points", "profile", "report", "end"]
    assert result_of(story, "fine").continued_from in (2, 4)
    assert result_of(story, "fine", 1).continued_from == 0


def test_every_point_is_a_run_in_mlflow_with_its_recipe_and_its_curve(story: Story) -> None:
    steps = {"prepare_data", "teacher_targets[0]", "teacher_targets[1]", "teacher", "profile", "report"}
    points = {"broken[0]", "fine[0]", "fine[1]", "warm[0]"}
    assert story.runs.keys() == {"", *steps, *points}
    assert {step for step, run in story.runs.items() if run.info.status != "FINISHED"} == {"broken[0]"}
    wanted = load_recipe(DEBUG, ["seed=1", "distill.validation={samples: 6, every_updates: 3}"]).model_dump(mode="json")
    params = story.runs["fine[1]"].data.params
    same = {name: text for name, text in flatten(wanted).items() if name.startswith(("hybrid.", "distill.", "seed"))}
    assert {name: params[name] for name in same} == same
    for name, seed in (("fine", 0), ("fine", 1), ("warm", 0)):
        run, result = story.runs[f"{name}[{seed}]"], result_of(story, name, seed)
        curve = Store(story.folder).curve(run, "validation/loss_prob")
        assert curve == result.curve
        assert [update for update, _ in curve] == [0, 3, 6]
        assert run.data.metrics["final_kl"] == result.final_kl
        assert run.data.metrics["easyvqa/accuracy"] == result.metrics["easyvqa/accuracy"]
    kept = Store(story.folder).artifacts(story.runs["report"], "report")
    assert kept == {f"report/{name}" for name in ("summary.json", "summary.md", "curves.png", "tradeoff.png")}
    mean = sum(result_of(story, "fine", seed).final_kl or 0 for seed in (0, 1)) / 2
    assert story.runs[""].data.metrics["fine/final_kl"] == pytest.approx(mean)


def test_the_models_are_gone_once_they_are_evaluated(story: Story) -> None:
    """The first listed of its size failed, so none was there to be profiled."""
    assert not list(story.place.glob("points/fine-*/model"))
    assert not list(story.place.glob("points/*/snapshots")) or list(story.place.glob("points/broken-0/snapshots"))
    assert {point.label for point in story.summary.profile.points} == {"teacher"}
