"""A run that is killed, continued, fails, and is continued again, ends as if nothing had happened.

One story, told once for all tests: SIGKILL in the middle of distillation; ``resume``, which fails in ``compare``; and
the command printed at the end of that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flow_tools import TIMED, WITH_DEBUG, FlowProcess, Store, finished_run, resume_commands, run_flow, run_folder

from matvlm.storage import read_json

pytestmark = pytest.mark.timeout(900)

SETTINGS = {"evaluate.samples_shown": "3", "tracking.model_name": "other", "profile.prompts": "[16, 32]"}
"""Overrides; none of them changes what is trained."""


@dataclass
class Attempt:
    """What there was after a process had ended."""

    code: int
    output: str
    runs: dict[str, Any]
    """MLflow's runs by step."""
    written: dict[str, tuple[int, int]]
    """Files of the run's folder: inode and time of last change, in ns."""


@dataclass
class Story:
    folder: Path
    killed: Attempt
    failed: Attempt
    continued: Attempt


def look(folder: Path, code: int, output: str) -> Attempt:
    place = run_folder(folder)
    stats = {str(path.relative_to(place)): path.stat() for path in place.rglob("*") if path.is_file()}
    written = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}
    return Attempt(code, output, Store(folder).runs(place.name), written)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("interrupted")
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    flow = FlowProcess(folder, *WITH_DEBUG, "run", "--max-workers", "2", "--set", *settings)
    flow.wait_until(lambda: any(folder.glob("runs/*/distill/aligned/snapshots/update-*")))
    flow.kill()
    killed = look(folder, flow.wait(), flow.output)
    (promised,) = resume_commands(flow.output)
    obstacle = run_folder(folder) / "report"
    obstacle.write_text("a file where a folder has to be")
    failed = look(folder, *run_flow(folder, *promised))
    obstacle.unlink()
    continued = look(folder, *run_flow(folder, *resume_commands(failed.output)[-1]))
    return Story(folder, killed, failed, continued)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.getbasetemp() / "finished")[1]


def run_id_of(attempt: Attempt) -> str:
    found = re.search(r"run-id (\d+)", attempt.output)
    assert found is not None, attempt.output
    return found[1]


def started(attempt: Attempt) -> list[str]:
    """The steps that ran, and were not taken over, in order."""
    return re.findall(r"\d/(\w+)/\d+ \(pid \d+\)\] Task is starting", attempt.output)


def test_it_was_killed_in_the_middle(story: Story) -> None:
    assert story.killed.code == -9
    assert "distill/aligned/checkpoint.json" not in story.killed.written
    assert not [name for name in story.killed.written if name.startswith("distill/aligned/model")]
    assert story.killed.runs["distill[aligned]"].info.status == "RUNNING"
    assert story.killed.runs[""].info.status == "RUNNING"


def test_the_failure_ends_with_the_command_that_goes_on(story: Story) -> None:
    """Metaflow's own bare ``resume`` would go back to the first run and distil once more."""
    assert story.failed.code != 0
    assert story.failed.runs["compare"].info.status == "FAILED"
    assert story.failed.runs[""].info.status == "FAILED"
    (promised,), (printed,) = resume_commands(story.killed.output), resume_commands(story.failed.output)
    assert story.failed.output.strip().endswith(" ".join(printed))
    for command, run_id in ((promised, run_id_of(story.killed)), (printed, run_id_of(story.failed))):
        assert command == ["resume", "--origin-run-id", run_id, "--max-workers", "2"]


def test_only_what_was_missing_is_done_again(story: Story) -> None:
    assert story.continued.code == 0, story.continued.output
    before = started(story.killed)
    assert before == [
        "start",
        "prepare_data",
        "teacher_targets",
        "teacher_targets",
        "join_targets",
        "init_hybrid",
        "choose_nodes",
        "distill",
    ]
    evaluations = ["evaluate"] * 3
    assert started(story.failed) == ["distill", "collect", "join_students", "list_models", *evaluations, "compare"]
    assert started(story.continued) == ["compare", "profile", "register", "end"]


def test_what_was_finished_is_not_written_again(story: Story) -> None:
    early = [name for name in story.killed.written if name.startswith(("data/", "targets/", "init/"))]
    assert len([name for name in early if re.fullmatch(r"targets/shard-.*\.safetensors", name)]) == 2
    late = [name for name in story.failed.written if name.startswith(("distill/", "evaluation/"))]
    assert "distill/aligned/model/model.safetensors" in late
    for names, then in ((early, story.killed), (late, story.failed)):
        for name in names:
            assert story.continued.written[name] == then.written[name], name


def test_distillation_went_on_from_its_snapshot(story: Story) -> None:
    assert re.search(r"distill aligned: .*6/6", story.failed.output)
    assert not re.search(r"distill aligned: +0%.*0/6", story.failed.output)


def test_the_student_is_the_same_to_the_bit(story: Story, uninterrupted: Path) -> None:
    ours, theirs = (run_folder(folder) / "distill" / "aligned" for folder in (story.folder, uninterrupted))
    model = "model/model.safetensors"
    assert (ours / model).read_bytes() == (theirs / model).read_bytes()
    results = [
        read_json(run_folder(f) / "evaluation" / "student" / "results.json") for f in (story.folder, uninterrupted)
    ]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_curves_are_the_same_to_the_bit_with_no_point_twice(story: Story, uninterrupted: Path) -> None:
    ours, theirs = Store(story.folder), Store(uninterrupted)
    run = story.continued.runs["distill[aligned]"]
    other = theirs.runs(run_folder(uninterrupted).name)["distill[aligned]"]
    assert run.data.metrics.keys() == other.data.metrics.keys()
    for metric in run.data.metrics:
        points = ours.curve(run, metric)
        assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6], metric
        if metric not in TIMED:
            assert points == theirs.curve(other, metric), metric


def test_mlflow_has_the_same_runs_and_they_are_finished(story: Story, uninterrupted: Path) -> None:
    for earlier in (story.killed, story.failed):
        for step, run in earlier.runs.items():
            assert story.continued.runs[step].info.run_id == run.info.run_id
    assert {run.info.status for run in story.continued.runs.values()} == {"FINISHED"}
    reference = Store(uninterrupted).runs(run_folder(uninterrupted).name)
    assert story.continued.runs.keys() == reference.keys()
    ours, theirs = story.continued.runs[""].data.metrics, reference[""].data.metrics
    for metric in ("accuracy/teacher", "accuracy/student", "accuracy/student_ untrained", "share_of_teacher"):
        assert ours[metric] == theirs[metric]
    client = Store(story.folder).client
    (version,) = client.search_model_versions("name = 'other'")
    assert version.run_id == story.continued.runs[""].info.run_id


def test_overrides_are_in_the_stored_recipe_and_survive(story: Story) -> None:
    params = story.continued.runs[""].data.params
    assert {name: params[name] for name in SETTINGS} == SETTINGS
    assert params["name"] == "debug"
    assert "| student | 16 |" in story.continued.output


def test_a_resumed_run_takes_no_overrides(tmp_path: Path) -> None:
    code, output = run_flow(tmp_path, "resume", "--set", "seed=1")
    assert code != 0
    assert output.strip() == "--set: a resumed run keeps its recipe; start a new run to change it"
