"""The command line: each command does its stage on real models, and whatever a user gets wrong is one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import released_layouts as layouts
import torch

import matvlm
from matvlm.artifacts import Checkpoint, ProfileResult
from matvlm.cli import main
from matvlm.config import Evaluate, Teacher
from matvlm.evaluate import evaluate
from matvlm.init import convert_
from matvlm.models import hybrid, locate, small
from matvlm.models.folder import ModelFolderError
from matvlm.profiling.tables import tables
from matvlm.reporting import Reporter
from matvlm.storage import StorageError
from matvlm.tracking import Tracker

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "flows" / "recipes" / "debug.yaml")
SIZES = small.SmallVLM(
    image_size=32, vision_hidden=32, vision_layers=1, vision_heads=2, vision_mlp=64, hidden=32, layers=4, heads=2
)
WORDS = "is there a red green blue circle triangle rectangle shape what color in the image ? yes no"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``teacher`` in bfloat16, and a ``student`` of which two layers are Mamba-2."""
    folder = tmp_path_factory.mktemp("models")
    processor = small.build_processor(SIZES, small.build_tokenizer([WORDS]))
    model = small.build_model(SIZES, processor.tokenizer)
    hybrid.save(small.build_model(SIZES, processor.tokenizer).bfloat16(), processor, folder / "teacher", {})
    convert_(model, [0, 2], "aligned")
    hybrid.save(model, processor, folder / "student", {})
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with MLflow's own default in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_help_names_every_command_and_starts_fast() -> None:
    done = subprocess.run([sys.executable, "-m", "matvlm", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("inspect", "targets", "distill", "convert", "sync", "watch", "evaluate", "profile", "chat", "demo")
    for name in names:
        assert f"\n    {name} " in done.stdout


def test_an_error_of_the_process_is_one_message_and_status_1() -> None:
    command = [sys.executable, "-m", "matvlm", "inspect", "nowhere.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    message = "matvlm inspect: nowhere.yaml: cannot read the recipe: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_inspect_shows_the_recipe_with_its_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--set", "seed=3 targets.top_k=16", "distill.max_updates=5", "--set", "distill.schedule={}"]
    assert main(["inspect", RECIPE, *overrides]) == 0
    text = capsys.readouterr().out
    assert "\n  seed: 3\n" in text
    assert "66 B per answer token (top 16" in text
    assert "5 in all: 0 warm-up, 5 stable" in text


def test_evaluate_says_what_the_stage_says(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(models / "student"), "--task", "easyvqa", "--limit", "24", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    words = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line}
    checkpoint = Checkpoint(uri=str(models / "student"), label="student")
    expected = evaluate(checkpoint, Evaluate(), 24, tmp_path / "again", Reporter())
    assert words.items() >= {name: f"{value:.4f}" for name, value in expected.metrics.items()}.items()
    assert f"  {expected.scores['easyvqa']}  accuracy" in printed
    assert json.loads((tmp_path / "results.json").read_text())["num_questions"] == 24
    settings = ["--against", str(tmp_path), "--data", "pope=nowhere", "--task", "pope", "--batch-size", "5"]
    assert main([*arguments[:-1], str(tmp_path / "both"), *settings]) == 0
    told = capsys.readouterr()
    assert "| easyvqa | accuracy | " in told.out
    assert "pope failed: nowhere: no such folder" in told.err
    record = json.loads((tmp_path / "both" / "easyvqa" / "results.json").read_text())
    assert record["settings"]["batch_size"] == 5


def test_distill_makes_what_is_missing_and_keeps_the_rest(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "distill",
        RECIPE,
        "--set",
        "data.max_samples=3",
        "distill.max_updates=2",
        "hybrid.calibration_samples=2",
    ]
    assert main(command) == 0
    folder = Path("runs", "debug")
    assert capsys.readouterr().out.startswith(f"{folder}/model: 2 updates, ")
    assert len(hybrid.mixers(matvlm.load(str(folder / "model"))[0])) == 2
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event[2] for event in events if event[0] == "metrics"] == [1, 2]
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert main(command) == main(["distill", str(folder / "job.json")]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == written
    assert main([*command, "hybrid.ratio=0.5"]) == 1
    assert "student.json: hybrid was {'ratio': 0.25" in capsys.readouterr().err
    broken = ["--set", "hybrid.init=random", "distill.loss.layer=1e38", "distill.max_skipped_updates=0"]
    assert main([*command, *broken, "--out", "other"]) == 1
    assert "matvlm distill: 1 of 2 updates had to be skipped" in capsys.readouterr().err.splitlines()[-1]


def test_profile_prints_what_it_writes(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs, out = [str(models / "teacher"), str(models / "student")], tmp_path / "new" / "profile"
    shape = ["--prompts", "16", "300", "--new-tokens", "2", "--batch-sizes", "2", "--repeats", "1"]
    assert main(["profile", *specs, "--stacks", "engine", "hf", *shape, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = ProfileResult.model_validate_json((out / "profile.json").read_text())
    assert [(p.label, p.stack, p.prompt, p.new_tokens, p.batch_size) for p in result.points] == [
        (label, stack, prompt, 2, 2)
        for label in ("teacher", "student")
        for stack in ("engine", "hf")
        for prompt in (16, 300)
    ]
    assert result.repeats == 1
    rows = [line.split() for line in printed.splitlines()]
    written = [line.strip("| ").split(" | ") for line in (out / "profile.md").read_text().splitlines()]
    for table in tables(result):
        for row in table.rows:
            assert " ".join(row).split() in rows
            assert " | ".join(row).strip("| ").split(" | ") in written
    assert f"threads: {torch.get_num_threads()}" in printed
    assert sorted(path.name for path in out.iterdir()) == ["profile.csv", "profile.json", "profile.md", "profile.png"]


def test_models_of_one_name_are_told_apart_by_their_folders(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "teacher").symlink_to(models / "student")
    specs = [str(models / "teacher"), str(tmp_path / "teacher")]
    assert main(["profile", *specs, "--prompts", "8", "--repeats", "1"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:6]] == [specs[0]] * 2 + [specs[1]] * 2


def test_a_registered_checkpoint_is_found_by_its_version_and_sent_by_sync(
    models: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = elsewhere / "runs" / "one"
    tracker = Tracker("one", root, "matvlm", f"sqlite:///{elsewhere / 'mlflow.db'}")
    tracker.parent({}, {})
    assert tracker.register("matvlm", str(models / "student"), "student", {}) == "1"
    tracker.summary({"accuracy": 0.5})
    assert main(["profile", "models:/matvlm/1", "--prompts", "8", "--repeats", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("matvlm/1 ")
    assert sorted(hybrid.mixers(matvlm.load("models:/matvlm/1")[0])) == [0, 2]
    assert main(["sync", str(root)]) == 0
    assert capsys.readouterr().out == "0 events sent\n"


@torch.no_grad()
def test_convert_writes_a_folder_that_inspect_and_load_open(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = layouts.tensors(student=True)
    layouts.write_release(elsewhere / "released", weights, layouts.mamba_json(), shards=2, dtype=torch.bfloat16)
    (elsewhere / "made").mkdir()
    assert main(["convert", "released", "made"]) == 0
    model, processor = matvlm.load("released")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    first = f"released: student, Mamba-2 in the layers 0, 2, {parameters:,} parameters\n"
    assert capsys.readouterr().out == f"{first}written to made\n"
    assert main(["inspect", "made"]) == 0
    assert "2 of 4 decoder layers are Mamba-2 (50.0%): 0, 2\n  start: paper\n" in capsys.readouterr().out
    again, chat = matvlm.load("made")
    text = chat.apply_chat_template([{"role": "user", "content": "Is it red?"}], add_generation_prompt=True)
    inputs, others = (each(text=text, return_tensors="pt") for each in (chat, processor))
    assert torch.equal(inputs.input_ids, others.input_ids)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    source = json.loads((elsewhere / "made" / "config.json").read_text())["matvlm"]["provenance"]["source"]
    assert source == "released"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", RECIPE, "--set", "distill.lr=1"], "debug.yaml: distill.lr: unknown key"),
        (["inspect", RECIPE, "--set", "hybrid.layers=[0, 1"], "the value is not valid YAML"),
        (["inspect", RECIPE, "--set", "hybrid.layers=[0, 99]"], "99"),
        (["targets", "nowhere.yaml"], "nowhere.yaml: cannot read the recipe"),
        (["targets", RECIPE, "--set", "targets.scheme=topk"], "targets.scheme: Input should be 'topk_tail' or"),
        (["targets", RECIPE, "--shard", "2"], "shard 2: targets.shards=2 are 0 to 1"),
        (["distill", "nowhere.yaml"], "nowhere.yaml: cannot read the recipe"),
        (["distill", RECIPE, "--set", "distill.lr=1"], "debug.yaml: distill.lr: unknown key"),
        (["distill", "nowhere.json"], "nowhere.json"),
        (
            ["distill", "{models}/student/config.json"],
            "config.json: not the job of a distillation: recipe: Field required",
        ),
        (
            ["distill", "job.json", "--set", "seed=1"],
            "job.json: a job has its recipe and folder; --set and --out are for",
        ),
        (["convert", "{models}/student", "made"], "config.json: model_type is 'matvlm', expected 'tinyllava'"),
        (["convert", "{models}", "made"], "config.json: cannot read: No such file"),
        (["convert", "{models}/student", "{models}"], "not a new or empty local folder; nothing was written"),
        (["convert", "{models}/student", "{models}/student/config.json"], "not a new or empty local folder"),
        (["convert", "{models}/student", "s3://bucket/key"], "s3://bucket/key: not a new or empty local folder"),
        (["sync", "nowhere"], "nowhere/tracking: no journals"),
        (["evaluate", "./nowhere"], "./nowhere: no such file or folder"),
        (["evaluate", "package://nothing"], "matvlm ships no model 'nothing'; it ships: "),
        (["evaluate", "{models}/student", "--task", "mmee"], "unknown task 'mmee'; known are easyvqa"),
        (["evaluate", "{models}/student", "--data", "pope"], "--data pope: expected TASK=URI"),
        (["evaluate", "{models}/student", "--against", "nowhere"], "nowhere/results.json: cannot read"),
        (["evaluate", "models:/matvlm"], "expected models:/NAME/VERSION"),
        (["profile", "{models}"], "no config.json there: not a model folder"),
        (["profile", "ftp://host/model"], "neither a local path nor s3://"),
        (["profile", "nobody/nothing"], "nobody/nothing: no such local folder, and the hub does not give"),
        (["profile", "{models}/student", "{models}/student"], "every checkpoint needs a label of its own"),
        (["profile", "x", "--prompts", "8", "0"], "options: prompts.1: Input should be greater than 0 (got 0)"),
        (["profile", "x", "--new-tokens", "1"], "options: new_tokens.0: Input should be greater than or equal to 2"),
        (["profile", "x", "--batch-sizes", "1", "1"], "options: batch_sizes: every value once, got [1, 1]"),
        (
            ["profile", "x", "--protocol", "paper", "--prompts", "8"],
            "protocol paper sets prompts to [769]: leave",
        ),
    ],
)
def test_what_a_user_gets_wrong_is_one_message(
    models: Path,
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main([word.format(models=models) for word in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith(f"matvlm {arguments[0]}: ")
    assert message in last
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("limit", ["0", "-1", "many", "1.5"])
def test_a_number_that_is_none_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "x", f"--limit={limit}"])
    assert stop.value.code == 2
    assert f"must be a whole number of at least 1, got {limit}" in capsys.readouterr().err


def test_half_precision_is_read_as_float32_on_a_cpu_only(models: Path) -> None:
    teacher = str(models / "teacher")
    model, processor = matvlm.load(teacher)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert processor.image_token == "<image>"
    assert locate.load(teacher, "meta")[0].dtype == torch.bfloat16
    assert locate.load(teacher, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_local_folder_goes_before_a_hub_id(models: Path, elsewhere: Path) -> None:
    (elsewhere / "org").mkdir()
    (elsewhere / "org" / "name").symlink_to(models / "student")
    assert sorted(hybrid.mixers(locate.load("org/name")[0])) == [0, 2]


def test_a_hub_model_is_opened_from_the_hub_cache(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--org--name"
    for revision, label in (("main", "teacher"), ("v2", "student")):
        commit = revision[0] * 40
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots").mkdir(exist_ok=True)
        (repository / "snapshots" / commit).symlink_to(models / label)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sorted(hybrid.mixers(locate.load("org/name")[0])) == []
    named = Teacher(model="org/name", revision="v2").uri
    assert named == "org/name@v2"
    assert sorted(hybrid.mixers(locate.load(named)[0])) == [0, 2]
    assert locate.describe(named, "student").layers == [0, 2]
    with pytest.raises(ModelFolderError, match="org/name: no such local folder"):
        locate.locate("org/name@v3")


def test_package_names_do_not_leave_the_package() -> None:
    for name in ("package://", "package://../config", "package://easyvqa-teacher/.."):
        with pytest.raises(ModelFolderError, match="ships no model"):
            locate.locate(name)


def test_a_typing_error_in_a_path_is_no_hub_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for path in ("runs/one/student", "./student", "/nowhere/student", "student"):
        with pytest.raises(StorageError, match="no such file or folder"):
            locate.locate(path)
