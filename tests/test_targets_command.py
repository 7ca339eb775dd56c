"""``python -m matvlm targets``: shard by shard, on S3, continued after a kill, and held against dense targets."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_distill import Stage, make_stage

from matvlm import storage
from matvlm.cli import main
from matvlm.data.prepare import open_dataset
from matvlm.targets import open_targets, read_manifest

FILES = {"manifest.json", *(f"shard-0000{n}-of-00003.{suffix}" for n in range(3) for suffix in ("json", "safetensors"))}
KILLED = """
import os, signal, sys
from matvlm.cli import main
from matvlm.targets import TargetJob

def compute(self, index, reporter=None, whole=TargetJob.compute):
    whole(self, index, reporter)
    os.kill(os.getpid(), signal.SIGKILL)

TargetJob.compute = compute
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
