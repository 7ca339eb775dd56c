"""Publishing a student while it is trained: the same training, models that open, and nothing published twice."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import metaflow
import pytest
import torch
from flow_tools import FLOWS
from tiny_distill import Kept, Stage, make_stage

from matvlm.config import Recipe
from matvlm.distill.job import EventLog, Tail
from matvlm.models import hybrid, locate
from matvlm.reporting import Reporter, Reporters
from matvlm.tracking import TrackingError, resolve_checkpoint
from matvlm.watch import RegisteredModel
from matvlm.watch.claims import Claims

sys.path.insert(0, str(FLOWS))
import evaluation

EVERY = 2  # of the 6 updates of the run, so that 2 and 4 are published


class Heard(Kept):
    """Keeps what it is told was published, too, in order."""

    def published(self, folder: str, updates: int) -> None:
        self.__dict__.setdefault("models", []).append((Path(folder).name, updates))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def recipe(stage: Stage) -> Recipe:
    return stage.but(publish_every_updates=EVERY, checkpoint_every_updates=3)


@pytest.fixture(scope="module")
def published(stage: Stage, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard]:
    heard, folder = Heard(), tmp_path_factory.mktemp("published")
    stage.run(folder, heard, recipe)
    return folder, heard


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_training_does_not_notice(stage: Stage, published: tuple[Path, Heard], tmp_path: Path) -> None:
    plain = Heard()
    stage.run(tmp_path, plain)
    folder, heard = published
    assert heard.seen == plain.seen
    assert sorted(heard.seen) == [1, 2, 3, 4, 5, 6]
    assert weights(folder / "model") == weights(tmp_path / "model")
    assert not (tmp_path / "published").exists()
    assert not hasattr(plain, "models")


def test_what_is_published_is_the_student_after_so_many_updates(
    stage: Stage, published: tuple[Path, Heard], tmp_path: Path
) -> None:
    folder, heard = published
    assert heard.models == [("update-000002", 2), ("update-000004", 4)]
    state = torch.load(stage_snapshot(stage, tmp_path, update=4) / "state.pt", map_location="cpu", weights_only=True)[
        "engine"
    ]
    model, processor = locate.load(str(folder / "published" / "update-000004"))
    ours = dict(model.named_parameters())
    trained = {name: values["value"] for name, values in state.items()}
    assert len(trained) > 5
    for name, value in trained.items():
        assert torch.equal(ours[name], value), name
    assert sorted(hybrid.mixers(model)) == [0, 2]
    assert processor.tokenizer is not None
    assert locate.describe(str(folder / "published" / "update-000002"), "student").updates == 2


def stage_snapshot(stage: Stage, folder: Path, update: int) -> Path:
    """Made by another run, which publishes nothing."""
    stage.run(folder, recipe=stage.but(checkpoint_every_updates=update))
    return folder / "snapshots" / f"update-{update:06d}"


def test_a_continued_run_publishes_nothing_twice(
    stage: Stage, recipe: Recipe, published: tuple[Path, Heard], tmp_path: Path
) -> None:
    """Stopped in update 5, it goes on from the snapshot of update 3 and comes by update 4 again."""

    def stop() -> None:
        raise KeyboardInterrupt

    first, second = Heard(at=5, then=stop), Heard()
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path, first, recipe)
    models = tmp_path / "published"
    before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
    assert first.models == [("update-000002", 2), ("update-000004", 4)]
    assert min(stage.run(tmp_path, second, recipe).updates, *second.computed) == 4
    assert second.models == first.models, "those that were there are told of again, in case nobody had heard of them"
    assert {path: path.stat().st_mtime_ns for path in models.rglob("*")} == before
    for name in ("update-000002", "update-000004"):
        assert weights(models / name) == weights(published[0] / "published" / name)


def test_what_another_run_left_is_written_anew(stage: Stage, recipe: Recipe, tmp_path: Path) -> None:
    old = tmp_path / "published"
    (old / "update-000002").mkdir(parents=True)
    (old / "update-000002" / "config.json").write_text("{}")
    (old / "update-000002.json").write_text(json.dumps({"seed": 99}))
    heard = Heard()
    stage.run(tmp_path, heard, recipe)
    assert Counter(heard.models) == Counter({("update-000002", 2): 1, ("update-000004", 4): 1})
    locate.load(str(old / "update-000002"))


def test_what_is_published_is_registered_once_and_waits_for_its_evaluation(
    stage: Stage, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the flow's own registrar, through an interruption."""

    def stop() -> None:
        raise KeyboardInterrupt

    place = folder / "runs" / "7"
    flow = SimpleNamespace(run_key="TrainFlow/7", folder=str(place), foreach_stack=list)
    monkeypatch.setattr(type(metaflow.current), "step_name", "distill")
    registrar = evaluation.Registrar(flow, recipe, "paper")
    with pytest.raises(KeyboardInterrupt):
        stage.run(place, Reporters(registrar, Kept(at=5, then=stop)), recipe)
    stage.run(place, registrar, recipe)
    source = RegisteredModel("matvlm")
    versions = [source.marks(checkpoint) for checkpoint in source.found()]
    assert [version["updates"] for version in versions] == ["2", "4"]
    for version, name in zip(versions, ("update-000002", "update-000004"), strict=True):
        assert version["matvlm.checkpoint_uri"] == str(place / "published" / name)
        assert (version["recipe"], version["init"]) == ("tiny", "paper")
        assert "gate" not in version
    assert len(Claims(source, "any", "place").new()) == 2
    with pytest.raises(TrackingError):
        resolve_checkpoint("models:/matvlm@candidate")


def test_what_other_processes_publish_is_passed_on(tmp_path: Path) -> None:
    heard = Heard()
    events = tmp_path / "events.jsonl"
    EventLog(events).published("a/b", 7)
    Tail(events, Reporters(Reporter(), heard)).catch_up()
    assert heard.models == [("b", 7)]
