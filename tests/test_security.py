"""What a run knows is in nothing it leaves behind; models, data sets and recipes from outside run no code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
import torch
from loopback import free_port
from safetensors import SafetensorError

from matvlm.config import Data
from matvlm.data.encoding import Encoder
from matvlm.data.prepare import prepare
from matvlm.data.rows import DataError
from matvlm.models import locate
from matvlm.models.folder import ModelFolderError
from matvlm.recipes import RecipeError, parse_recipe
from matvlm.targets.shards import Shard, open_shard
from matvlm.tracking import Tracker
from matvlm.tracking.store import open_client

ROOT = Path(__file__).resolve().parents[1]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE0SECRET",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+0123456789",
    "AWS_SESSION_TOKEN": "session-token-0123456789",
    "HF_TOKEN": "hf_0123456789secret",
    "MATVLM_JUDGE_KEY": "judge-0123456789",
}
USER, PASSWORD = "tracking-user", "tracking:p@ssword"

TRACKED_RUN = """
import logging, os, sys, traceback
from pathlib import Path
logging.basicConfig(level=logging.DEBUG)
from matvlm.config import Recipe
from matvlm.plots import loss_curves
from matvlm.tracking import Tracker, environment, flatten, resolve_checkpoint, sync
from matvlm.watch.sources import RegisteredModel

def attempt(work):
    try:
        work()
    except Exception:
        traceback.print_exc()

def step(tracker):
    with tracker.step("distill") as run:
        run.metrics({"loss": 0.5}, 1)
        loss_curves([{"update": 1, "loss": 0.5}], Path("loss.png"))
        run.artifact(Path("loss.png"), "plots")
        raise RuntimeError("the step that fails")

reached = Tracker("secret/1", Path("runs/1"), "secret")
reached.parent({**flatten(Recipe(name="debug").model_dump(mode="json")), **environment()}, {"recipe": "debug"})
attempt(lambda: step(reached))
reached.register("secret", "s3://models/student", "student", {"accuracy": 0.5})
reached.finish("FAILED")
attempt(lambda: resolve_checkpoint("models:/nothing/1"))
away = Tracker("secret/2", Path("runs/2"), "secret", sys.argv[1])
attempt(lambda: step(away))
away.finish("FAILED")
attempt(lambda: sync("runs/2", sys.argv[1]))
attempt(lambda: resolve_checkpoint("models:/secret/1", sys.argv[1]))
attempt(RegisteredModel("secret", sys.argv[1]).found)
"""


def test_secrets_of_the_environment_are_in_nothing_that_a_run_leaves(
    folder: Path, serve: Callable[[int], subprocess.Popen[str]]
) -> None:
    port, dead = free_port(), free_port()
    serve(port)
    login = f"{USER}:{PASSWORD.replace('@', '%40').replace(':', '%3A', 1)}"
    variables = {**SECRETS, "MLFLOW_TRACKING_URI": f"http://{login}@127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TRACKED_RUN, f"http://{login}@127.0.0.1:{dead}"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    left |= {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    everything = b"".join(left.values())
    for seen in (b"the step that fails", b"cannot be used", b"models:/nothing/1: not found", b"View run distill"):
        assert seen in done.stdout.encode() + done.stderr.encode(), done.stderr
    assert b"env.version.torch" in everything
    assert any(name.startswith("mlartifacts/") and name.endswith("plots/loss.png") for name in left)
    for secret in (*SECRETS.values(), login, PASSWORD, USER, login.partition(":")[2]):
        assert [name for name, content in left.items() if secret.encode() in content] == [], secret


def test_a_login_in_the_address_reaches_the_server_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "of another server")
    client = open_client("http://someone:a%3Ab%40c@127.0.0.1:1")
    assert client.tracking_uri == "http://127.0.0.1:1"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "someone"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "a:b@c"


def test_names_of_steps_and_experiments_stay_below_the_run_s_folder(folder: Path) -> None:
    tracker = Tracker("names", folder / "runs" / "7", "../../escaped")
    plot = folder / "plot.svg"
    plot.write_text("<svg/>")
    before = set(folder.iterdir())
    for name in ("..", "../../up", "/etc/cron.d/x", "a/b"):
        with tracker.step(name) as run:
            run.artifact(plot, "plots")
    assert set(folder.iterdir()) - before == {folder / "runs", folder / "mlruns"}
    assert [path.name for path in (folder / "runs").iterdir()] == ["7"]
    assert [path.name for path in (folder / "runs" / "7").iterdir()] == ["tracking"]
    assert len(list((folder / "runs/7/tracking/files").glob("*/plots/plot.svg"))) == 4
    assert len(list((folder / "mlruns").rglob("plot.svg"))) == 4


class Bomb:
    """A pickle that makes a file when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """One that is known to go off."""
    armed = Bomb(tmp_path / "ran")
    pickle.loads(pickle.dumps(armed))
    armed.marker.unlink()
    return armed


@pytest.fixture
def model(talkers: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher's folder."""
    return Path(shutil.copytree(talkers / "teacher", tmp_path / "model"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "indexed", "renamed"])
def test_a_pickle_where_weights_are_expected_is_not_read_as_one(model: Path, bomb: Bomb, name: str) -> None:
    (weights,) = model.glob("*.safetensors")
    weights.unlink()
    file = {"indexed": "pytorch_model.bin", "renamed": "weights.safetensors"}.get(name, name)
    torch.save({"model.embed_tokens.weight": bomb}, model / file)
    if file != name:
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": file}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError):
        locate.load(str(model))
    assert not bomb.marker.exists()


def test_a_pickle_where_targets_are_expected_is_not_read_as_one(tmp_path: Path, bomb: Bomb) -> None:
    torch.save({"ids": bomb}, tmp_path / "shard.safetensors")
    content = (tmp_path / "shard.safetensors").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    shard = Shard(file="shard.safetensors", sha256=sha256, num_bytes=len(content), num_samples=1, num_positions=1)
    with pytest.raises(SafetensorError, match="header"):
        open_shard(str(tmp_path), shard)
    assert not bomb.marker.exists()


def test_a_pickle_or_a_script_where_a_data_set_is_expected_does_not_run(tmp_path: Path, bomb: Bomb) -> None:
    place = tmp_path / "set"
    place.mkdir()
    (place / "train.pkl").write_bytes(pickle.dumps(bomb))
    (place / "set.py").write_text(f"open({str(bomb.marker)!r}, 'w')")
    with pytest.raises(DataError):
        prepare(Data(source="datasets", path=str(place)), 0, tmp_path / "prepared")
    assert not bomb.marker.exists()


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "code.Evil"}}),
        ("config.json", {"auto_map": {"AutoConfig": "code.Evil", "AutoModelForImageTextToText": "code.Evil"}}),
        ("processor_config.json", {"processor_class": "Evil", "auto_map": {"AutoProcessor": "code.Evil"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}},
        ),
        ("generation_config.json", {"custom_generate": "code.py"}),
    ],
)
def test_code_in_a_model_folder_does_not_run_whatever_the_answer_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, fields: dict[str, Any]
) -> None:
    """Nobody is even asked: a ``y`` that is piped into a command would be an answer."""
    marker = tmp_path / "ran"
    (model / "custom_generate").mkdir()
    for place in (model / "code.py", model / "custom_generate" / "generate.py"):
        place.write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\ndef generate(*a, **k): pass\n")
    rewrite(model / file, **fields)
    asked = io.StringIO("y\n" * 20)
    monkeypatch.setattr("sys.stdin", asked)
    with suppress(ValueError, OSError):  # an error is as good as a model that does without the code
        tiny_chat.answer(*locate.load(str(model)), tiny_chat.QUESTION, [], 2)
    assert asked.tell() == 0
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (model / "chat_template.jinja").write_text(template)
    _, processor = locate.load(str(model))
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|immutable|not safely callable"):
        Encoder(processor).prompt("what")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [touch ran]", "!!python/name:os.system", "!!new x"])
def test_a_recipe_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^evil\.yaml: not valid YAML"):
        parse_recipe(f"name: debug\ndescription: {tag}", "evil.yaml")
    with pytest.raises(RecipeError, match=r"^evil\.yaml: override .* not valid YAML"):
        parse_recipe("name: debug", "evil.yaml", [f"description={tag}"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", "a\nb", ""])
def test_the_name_of_a_recipe_is_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(RecipeError, match="recipe: name: "):
        parse_recipe(json.dumps({"name": name}))


def test_pages_show_what_models_and_data_say_as_text() -> None:
    page = (ROOT / "matvlm" / "chat" / "page.html").read_text(encoding="utf-8")
    assert "textContent" in page
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page) == []
