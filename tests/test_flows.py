"""The flows from end to end, run as a user runs them, and judged by what they leave in MLflow, on disk and screen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from flow_tools import (
    DEBUG,
    ROOT,
    TIMED,
    WITH_DEBUG,
    FlowProcess,
    Store,
    cards,
    environment,
    finished_run,
    run_flow,
    run_folder,
)

import matvlm
from matvlm.models.hybrid import mixers
from matvlm.recipes import load_recipe
from matvlm.tracking import flatten, resolve_checkpoint, sync

pytestmark = pytest.mark.timeout(900)

STEPS = {
    *("start", "prepare_data", "teacher_targets", "join_targets", "init_hybrid", "choose_nodes", "distill", "collect"),
    "join_students",
    *("list_models", "evaluate", "compare", "profile", "register", "end"),
}
TRACKED = {
    "": set[str](),
    "prepare_data": set[str](),
    "teacher_targets[0]": set[str](),
    "teacher_targets[1]": set[str](),
    "join_targets": {"targets/kept_mass_mean"},
    "init_hybrid": {"replaced_layers", "parameters"},
    "distill[aligned]": {"loss", "loss_prob", "loss_layer", "lr", "grad_norm", *TIMED},
    "evaluate[teacher]": {"easyvqa/accuracy", "questions_per_second"},
    "evaluate[student]": {"easyvqa/accuracy", "questions_per_second"},
    "evaluate[student, untrained]": {"easyvqa/accuracy", "questions_per_second"},
    "compare": {"accuracy/student"},
    "profile": {"profile/student/engine/decode_tokens_per_second", "profile/teacher/hf/cache_bytes"},
}
"""Step -> metrics it must have in MLflow; '' is the parent run."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return finished_run(tmp_path_factory.getbasetemp() / "finished")


@pytest.fixture(scope="module")
def folder(finished: tuple[Any, Path]) -> Path:
    return finished[1]


@pytest.fixture(scope="module")
def store(folder: Path) -> Store:
    return Store(folder)


@pytest.fixture(scope="module")
def runs(folder: Path, store: Store) -> dict[str, Any]:
    return store.runs(run_folder(folder).name)


def accuracy_of(folder: Path, label: str) -> float:
    metrics = json.loads((run_folder(folder) / "evaluation" / label / "results.json").read_text())["metrics"]
    return float(metrics["easyvqa/accuracy"])


def test_every_step_finishes_and_says_what_came_out(finished: tuple[Any, Path]) -> None:
    answer, folder = finished
    assert answer.status == "successful", answer.stderr
    assert {step.id for step in answer.run} == STEPS
    assert all(task.successful for step in answer.run for task in step)
    for row in (
        f"| student | aligned | 6 | {accuracy_of(folder, 'student'):.2%} |",
        "| teacher | engine | 64 |",
        "| student | hf | 64 |",
    ):
        assert row in answer.stdout
    for line in (
        "(matvlm version 1)",
        "Compare runs: mlflow ui",
        "If it is interrupted: python flows/train_flow.py resume --origin-run-id",
    ):
        assert line in answer.stdout
    assert re.search(r"distill aligned: 100% 6/6 \[.* update/s, loss=", answer.stdout)


def test_nothing_but_the_stages_own_bars_is_in_the_log(finished: tuple[Any, Path]) -> None:
    log = finished[0].stdout + finished[0].stderr
    for noise in ("Loading weights", "model shards", "Saving the dataset", "it/s]", "Warning", "WARNING", "Traceback"):
        assert noise not in log, noise


def test_mlflow_has_a_run_per_step_under_one_parent(store: Store, runs: dict[str, Any]) -> None:
    assert set(runs) == set(TRACKED)
    for step, run in runs.items():
        assert run.info.status == "FINISHED", step
        assert run.data.metrics.keys() >= TRACKED[step], step
        parent = run.data.tags.get("mlflow.parentRunId")
        assert parent == (runs[""].info.run_id if step else None)


def test_parameters_are_the_resolved_recipe_and_the_surroundings(runs: dict[str, Any]) -> None:
    params = runs[""].data.params
    recipe = flatten(load_recipe(DEBUG).model_dump(mode="json"))
    assert {name: value for name, value in params.items() if not name.startswith("env.")} == recipe
    assert params.keys() >= {"env.python", "env.version.torch", "env.version.transformers", "env.version.metaflow"}
    assert params["env.devices"]
    assert params["env.torch_threads"] == "1"
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", params["env.git_commit"])


def test_distillation_is_tracked_update_by_update(store: Store, runs: dict[str, Any]) -> None:
    run = runs["distill[aligned]"]
    curves = {metric: store.curve(run, metric) for metric in TRACKED["distill[aligned]"]}
    for metric, points in curves.items():
        assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6], metric
    value = {metric: [v for _, v in points] for metric, points in curves.items()}
    assert value["loss"][-1] < value["loss"][0]
    assert value["loss"] == pytest.approx([a + b for a, b in zip(value["loss_prob"], value["loss_layer"], strict=True)])
    assert value["lr"] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 0])
    assert all(0.1 < memory < 6 for memory in value["memory_gb"])


def test_reports_are_kept_in_mlflow(store: Store, runs: dict[str, Any]) -> None:
    made = {
        "compare": {
            *("report/accuracy.md", "report/accuracy.png", "report/answers.html"),
            *("report/scores.md", "report/scores.json", "report/regressions.html"),
        },
        "profile": {f"report/profile.{ending}" for ending in ("md", "json", "csv", "png")},
        "distill[aligned]": {"plots/loss_curves.png"},
        "evaluate[student]": {"evaluation/results.json", "evaluation/samples.jsonl"},
    }
    for step, wanted in made.items():
        kept = {path for folder in store.artifacts(runs[step]) for path in store.artifacts(runs[step], folder)}
        assert kept == wanted
        for path in wanted:
            content = store.read(runs[step], path)
            assert content.startswith(b"\x89PNG") if path.endswith(".png") else content
    answers = store.read(runs["compare"], "report/answers.html").decode()
    assert answers.count("<img") == load_recipe(DEBUG).evaluate.samples_shown
    assert "data:image/png;base64," in answers


def test_the_table_says_what_was_measured(folder: Path, store: Store, runs: dict[str, Any]) -> None:
    table = store.read(runs["compare"], "report/accuracy.md").decode()
    shown = {cells[1].strip(): cells[4].strip() for line in table.splitlines()[2:] if (cells := line.split("|"))}
    files = {"teacher": "teacher", "student": "student", "student, untrained": "student-untrained"}
    assert shown == {label: f"{accuracy_of(folder, name):.2%}" for label, name in files.items()}
    for label, name in files.items():
        assert runs[f"evaluate[{label}]"].data.metrics["easyvqa/accuracy"] == accuracy_of(folder, name)
    student = accuracy_of(folder, "student")
    assert runs[""].data.metrics["accuracy/student"] == student
    assert runs[""].data.metrics["share_of_teacher"] == student / accuracy_of(folder, "teacher")


def test_the_student_is_registered_and_opens(folder: Path, store: Store, runs: dict[str, Any]) -> None:
    version = store.client.get_model_version_by_alias("matvlm", "candidate")
    assert store.client.get_model_version_by_alias("matvlm", "champion").version == version.version
    assert version.tags["gate"] == "passed"
    assert float(version.tags["gate.score.easyvqa"]) == pytest.approx(100 * accuracy_of(folder, "student"))
    assert version.run_id == runs[""].info.run_id
    assert float(version.tags["metric.accuracy/student"]) == accuracy_of(folder, "student")
    uri = resolve_checkpoint("models:/matvlm@candidate", f"sqlite:///{folder / 'mlflow.db'}")
    model, processor = matvlm.load(uri)
    assert sorted(mixers(model)) == [0, 4]
    assert processor.tokenizer is not None


def test_cards_show_curves_and_answers(folder: Path) -> None:
    found = cards(folder)
    assert {step: len(pages) for step, pages in found.items()} == {
        "distill": 1,
        "evaluate": 3,
        "compare": 1,
        "profile": 1,
    }
    assert "vega-lite" in found["distill"][0]
    for title in ("total", "probabilities", "layers"):
        points = re.findall(rf'"update": (\d), "series": "{title}"', found["distill"][0])
        assert points == ["1", "2", "3", "4", "5", "6"], title
    regressions = (run_folder(folder) / "report" / "regressions.html").read_text().count("<img")
    shown = load_recipe(DEBUG).evaluate.samples_shown + regressions
    assert found["compare"][0].count("data:image/png;base64,") == shown
    assert "vega-lite" in found["profile"][0]
    assert any(f"{100 * accuracy_of(folder, 'student'):.1f}" in page for page in found["evaluate"])


@pytest.mark.slow
def test_a_registered_student_is_evaluated_by_the_watcher_with_the_same_result(
    folder: Path, store: Store, runs: dict[str, Any], tmp_path: Path
) -> None:
    """Beside a benchmark that fails, which neither loses the other one nor counts."""
    settings = ["evaluate.tasks=[easyvqa, pope]", "evaluate.data={pope: nowhere}", "promote.tasks=[easyvqa]"]
    words = [sys.executable, "-m", "matvlm", "watch", str(DEBUG), "--once", "--set", *settings]
    for number in range(2):
        done = subprocess.run(
            words, cwd=folder, env=environment(MATVLM_RUNS=str(tmp_path)), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("models:/matvlm/1: done" in done.stdout) == (number == 0)
    (place,) = tmp_path.glob("debug-*")
    (log,) = (tmp_path / "watch").glob("*/*/output.txt")
    student = run_folder(folder) / "distill" / "aligned" / "model"
    output = log.read_text()
    assert f"{student}, 40 questions" in output
    assert f"easyvqa/accuracy: {accuracy_of(folder, 'student'):.4f}" in output
    assert "| student | engine | 64 |" in output
    for who in ("teacher", "student"):
        assert f"pope failed for the {who}: nowhere: no such folder" in output
    again = store.runs(place.name)
    parts = {f"evaluate[{who}, {task}]" for who in ("teacher", "student") for task in ("easyvqa", "pope")}
    assert set(again) == {"", "compare", "profile", "gate", *parts}
    assert {step for step, run in again.items() if run.info.status != "FINISHED"} == {
        *("evaluate[teacher, pope]", "evaluate[student, pope]")
    }
    wanted = json.loads((run_folder(folder) / "evaluation" / "student" / "results.json").read_text())["metrics"]
    assert again[""].data.metrics == wanted
    assert again[""].data.tags["checkpoint"] == "models:/matvlm/1"
    assert again[""].data.tags["checkpoint_uri"] == str(student)
    version = store.client.get_model_version("matvlm", "1")
    mean = 100 * accuracy_of(folder, "student")
    assert float(version.tags["gate.mean"]) == pytest.approx(mean)
    assert version.tags["gate.champion"] == "it is the champion already"
    assert again["gate"].data.metrics["teacher_mean"] == pytest.approx(100 * accuracy_of(folder, "teacher"))
    assert version.tags["watch.debug"].startswith("done, ")


def test_speed_and_memory_are_measured_without_training(folder: Path, store: Store, tmp_path: Path) -> None:
    """Of a registered student and of the same one's folder, beside the teacher."""
    student = run_folder(folder) / "distill" / "aligned" / "model"
    words = (*WITH_DEBUG, "run", "--checkpoints", f"models:/matvlm/1 {student}", "--set", "profile.prompts=[16]")
    code, output = run_flow(folder, *words, flow="profile_flow.py", MATVLM_RUNS=str(tmp_path))
    assert code == 0, output
    for label in ("teacher", "matvlm/1", "model"):
        for stack in ("engine", "hf"):
            assert f"| {label} | {stack} | 16 |" in output
    (place,) = tmp_path.glob("debug-*")
    runs = store.runs(place.name)
    assert {step: run.info.status for step, run in runs.items()} == {"": "FINISHED", "profile": "FINISHED"}
    metrics = runs["profile"].data.metrics
    same = [metrics[f"profile/{label}/hf/cache_bytes"] for label in ("matvlm/1", "model", "teacher")]
    assert same[0] == same[1] != same[2]
    assert "report/profile.csv" in store.artifacts(runs["profile"], "report")


@pytest.mark.slow
def test_a_folder_is_evaluated_with_the_same_result(folder: Path, tmp_path: Path) -> None:
    student = run_folder(folder) / "distill" / "aligned" / "model"
    words = (*WITH_DEBUG, "run", "--checkpoint", str(student))
    code, output = run_flow(folder, *words, flow="eval_flow.py", MATVLM_RUNS=str(tmp_path))
    assert code == 0, output
    assert f"easyvqa/accuracy: {accuracy_of(folder, 'student'):.4f}" in output
    assert "Promotion: passed: the mean of easyvqa is" in output


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        (["distill.learning_rate=1"], "distill.learning_rate: unknown key"),
        (["hybrid.ratio=many"], "hybrid.ratio: Input should be a valid number, unable to parse"),
        (["seed=1", "hybrid.ratio=0.99"], "hybrid: ratio 0.99 replaces all 8 layers"),
        (["hybrid.layers=[0, 1, 2, 3, 4, 5, 6, 7]"], "replaces all 8 layers: at least one has to stay attention"),
        (["hybrid.layers=[7, 8]"], "hybrid: layers [8] do not exist: the model has layers 0 to 7"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_before_any_step(
    tmp_path: Path, setting: list[str], complaint: str
) -> None:
    code, output = run_flow(tmp_path, *WITH_DEBUG, "run", "--set", *setting)
    assert code != 0
    (line,) = output.strip().splitlines()
    assert line.startswith(f"{DEBUG}: ")
    assert complaint in line
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_what_a_user_got_wrong_inside_a_step_is_one_message(tmp_path: Path) -> None:
    """Three flows side by side: data that is not there, no such model version, no such folder."""
    places = [tmp_path / name for name in ("data", "version", "path")]
    for place in places:
        place.mkdir()
    data, version, path = places
    recipe = yaml.safe_load(DEBUG.read_text())
    recipe["data"] = {"source": "llava", "path": "missing.json"}
    (data / "mine.yaml").write_text(yaml.safe_dump(recipe))
    flows = [
        FlowProcess(data, "--config", "recipe", "mine.yaml", "run"),
        FlowProcess(version, *WITH_DEBUG, "run", "--checkpoint", "models:/nothing@candidate", flow="eval_flow.py"),
        FlowProcess(path, *WITH_DEBUG, "run", "--checkpoint", "not/here/either", flow="eval_flow.py"),
    ]
    for flow in flows:
        assert flow.wait() != 0
        assert "Traceback" not in flow.output, flow.output
    outputs = [flow.output for flow in flows]
    assert "missing.json: cannot read the conversations (data.path)" in outputs[0]
    assert "prepare_data cannot go on:" in outputs[0]
    assert "resume --origin-run-id" in outputs[0].splitlines()[-1]
    runs = Store(data).runs(run_folder(data).name)
    assert {step: run.info.status for step, run in runs.items()} == {"": "FAILED", "prepare_data": "FAILED"}
    assert "models:/nothing@candidate: not found in MLflow" in outputs[1]
    assert "not/here/either" in outputs[2]
    for output, place in zip(outputs[1:], places[1:], strict=True):
        assert "start cannot go on:" in output
        assert "resume" not in output
        assert not (place / "runs").exists()


@pytest.mark.slow
def test_a_run_without_its_tracking_server_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run_flow(tmp_path, *WITH_DEBUG, "run", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert code == 0, output
    assert "Traceback" not in output
    assert "The run goes on; what it tracks is kept in" in output
    assert f"python -m matvlm sync {run_folder(tmp_path)}" in output
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert sync(run_folder(tmp_path), f"sqlite:///{tmp_path / 'mlflow.db'}") > 0
    store = Store(tmp_path)
    runs = store.runs(run_folder(tmp_path).name)
    assert set(runs) == set(TRACKED)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert [step for step, _ in store.curve(runs["distill[aligned]"], "loss")] == [1, 2, 3, 4, 5, 6]
    assert store.client.get_model_version_by_alias("matvlm", "candidate").run_id == runs[""].info.run_id


def test_the_teacher_flow_leaves_a_model_with_a_card(tmp_path: Path) -> None:
    tiny = "training.updates=2 training.batch_size=4 training.held_out_images=2 evaluate.limit=20 data.max_samples=30"
    code, output = run_flow(tmp_path, "run", "--set", tiny, flow="teacher_flow.py")
    assert code == 0, output
    folder = run_folder(tmp_path) / "teacher" / "model"
    model, processor = matvlm.load(str(folder))
    assert mixers(model) == {}
    assert processor.tokenizer.unk_token_id not in processor.tokenizer("is there a blue circle?")["input_ids"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "python flows/teacher_flow.py --config recipe flows/recipes/teacher-easyvqa.yaml run` (2 updates)" in card
    assert re.search(r"\| easyvqa/accuracy \| [01]\.\d{4} \|", card)
    assert f"Teacher: {folder}" in output
