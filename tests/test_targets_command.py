"""``python -m matvlm targets``: shard by shard, on S3, continued after a kill, and held against dense targets."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tiny_distill import Stage, make_stage

from matvlm import storage
from matvlm.cli import main
from matvlm.data.prepare import open_dataset
from matvlm.targets import TargetError, open_targets, read_manifest

FILES = {"manifest.json", *(f"shard-0000{n}-of-00003.{suffix}" for n in range(3) for suffix in ("json", "safetensors"))}
KILLED = """
import os, signal, sys
from matvlm.cli import main
from matvlm.targets import compute

def write_shard(*arguments, whole=compute.write_shard):
    whole(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)

compute.write_shard = write_shard
main(["targets", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def recipe(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file of three shards and a top-k that leaves a tail, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    content = stage.recipe.model_dump(mode="json")
    content["targets"] |= {"top_k": 4, "shards": 3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "recipe.yaml")


def written(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_one_shard_after_the_other(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", recipe, "--shard", "1"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"4 samples in \d+\.\d s: [\d.,]+ samples/s, writing included\n", out)
    assert "runs/tiny/targets: not joined, as shards are missing: 0, 2\n" in out
    first = written(Path("runs/tiny/targets"))
    assert main(["targets", recipe]) == 0
    out = capsys.readouterr().out
    assert out.startswith("7 samples in "), "what was there is not computed again"
    store = read_manifest("runs/tiny/targets")
    assert (
        f"runs/tiny/targets: 11 samples, {store.num_positions} positions of {store.bytes_per_position:.1f} B; mass of "
        f"the top 4: mean {store.kept_mass_mean:.4%}, 1st percentile {store.kept_mass_p1:.4%}\n"
    ) in out
    assert store.kept_mass_p1 < store.kept_mass_mean < 1
    after = written(Path("runs/tiny/targets"))
    assert first.items() <= after.items()
    assert after.keys() == FILES
    assert main(["targets", recipe]) == 0
    assert capsys.readouterr().out.startswith("runs/tiny/targets: 11 samples"), "nothing was computed"


def test_a_killed_command_continues_with_the_missing_shards(recipe: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, recipe], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = Path("runs/tiny/targets")
    first = written(folder)
    assert first.keys() == {"shard-00000-of-00003.json", "shard-00000-of-00003.safetensors"}
    assert main(["targets", recipe]) == 0
    after = written(folder)
    assert first.items() <= after.items()
    assert after.keys() == FILES
    assert len(open_targets(str(folder))) == 11


def picture(stage: Stage, row: int) -> Path:
    return Path(str(stage.recipe.data.path)).with_name(f"{row}.png")


def test_two_processes_of_which_one_is_killed(stage: Stage, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The second waits for a picture that never comes, with its first shard written; then two others go on."""
    cut = ["targets.shards=4", "targets.batch_size=1", "resources.processes=2"]
    assert main(["targets", recipe, "--out", "alone", "--set", *cut[:2]]) == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    hidden, file = Path("hidden.png").resolve(), picture(stage, 3)
    file.rename(hidden)
    os.mkfifo(file)
    command = [sys.executable, "-m", "matvlm", "targets", recipe, "--set", *cut]
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    folder = Path("runs/tiny/targets")
    try:
        wait_for(lambda: len(list(folder.glob("*.json"))) == 3, started)
        second = next(child for child in psutil.Process(started.pid).children() if child.environ()["RANK"] == "1")
        second.kill()
        _, errors = started.communicate(timeout=60)
    finally:
        started.kill()
        file.unlink()
        hidden.rename(file)
    assert started.returncode == 1
    host = re.escape(socket.gethostname())
    told = rf"matvlm targets: rank 1 of 2 \(pid {second.pid} on {host}\) ended with SIGKILL: .* finished shards stay"
    assert re.match(told, errors.splitlines()[-1])
    first = written(folder)
    assert sorted(name[:11] for name in first if name.endswith(".json")) == [f"shard-0000{n}" for n in (0, 1, 2)]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command[1:]]
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.match(r"2 samples in .*\n.*targets: 11 samples", done.stdout)
    after = written(folder)
    assert first.items() <= after.items()
    for path in Path("alone").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 100
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


def test_tasks_of_a_flow_take_turns_at_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "flows")
    device = importlib.import_module("support").device
    for gpus, devices in ((0, ["cpu"] * 3), (1, ["cuda:0"] * 3), (2, ["cuda:0", "cuda:1", "cuda:0"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert [device(task) for task in range(3)] == devices
        assert device() == ("cuda" if gpus else "cpu")


def test_a_sample_that_cannot_be_loaded(
    stage: Stage, recipe: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Named and counted, left out of the store, and of a distillation even if its picture is there again."""
    lenient = ["--set", "data.max_bad_share=0.4"]
    file, hidden = picture(stage, 5), Path("hidden.png").resolve()
    assert main(["targets", recipe, "--shard", "0", *lenient]) == 0, "which prepares the data"
    file.rename(hidden)
    try:
        assert main(["targets", recipe, *lenient]) == 0
    finally:
        hidden.rename(file)
    lost = open_dataset(stage.data)[5]["id"]
    assert f"shard-00002-of-00003 lacks a sample: missing image: {lost}: {file}" in caplog.text
    out = capsys.readouterr().out
    assert "runs/tiny/targets: 10 samples" in out
    assert "left out, as they could not be loaded: 1 sample" in out
    reader = open_targets("runs/tiny/targets")
    assert (list(reader.unusable), len(reader)) == ([lost], 10)
    with pytest.raises(TargetError, match=f"no targets for sample '{lost}': missing image"):
        reader.lookup([lost])
    caplog.clear()
    assert main(["distill", recipe, *lenient]) == 0
    lacking = [record.message for record in caplog.records if "lacks a sample" in record.message]
    assert len(lacking) == 2, "once an epoch"
    assert all(f"lacks a sample: missing image: {lost}: {file}" in message for message in lacking)


def test_the_gradients_of_both_schemes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["targets.scheme=topk_sampled targets.samples=2", "targets.positions=text", "hybrid.layers=sensitivity"]
    assert main(["targets", recipe, "--set", *changes, "--check", "2"]) == 0
    out = capsys.readouterr().out
    report = json.loads(Path("runs/tiny/targets/gradient_error.json").read_text())
    sampled, tail = report["errors"]
    assert re.search(
        rf"topk_sampled +4 +2 +{sampled['mean']:.3%} +{sampled['pooled']:.3%} +{sampled['summed']:.3%}\n", out
    )
    assert re.search(rf"topk_tail +32 +{tail['mean']:.3%} +", out)
    assert f"on 8 samples, {report['num_positions']} positions" in out, "two batches of four"
    identity = read_manifest("runs/tiny/targets").identity
    assert (identity.scheme, identity.samples, identity.positions) == ("topk_sampled", 2, "text")


def test_a_store_on_s3(stage: Stage, recipe: str, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", recipe, "--out", f"{bucket}/targets", "--shard", "2"]) == 0
    assert main(["targets", recipe, "--out", f"{bucket}/targets", "--check", "1"]) == 0
    assert f"{bucket}/targets: 11 samples" in capsys.readouterr().out
    assert set(storage.list_files(f"{bucket}/targets")) == FILES | {"gradient_error.json"}
    assert main(["targets", recipe, "--out", "here"]) == 0
    remote, local = open_targets(f"{bucket}/targets"), open_targets("here")
    ids = open_dataset(stage.data)["id"][:]
    assert all((a == b).all() for a, b in zip(remote.lookup(ids), local.lookup(ids), strict=True))
