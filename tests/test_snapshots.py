"""Snapshots are whole or not there, believed only with their checksum, and bound to what made them."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from matvlm import snapshots
from matvlm.snapshots import RECORD, STATE, SnapshotError, Snapshots
from matvlm.storage import StorageError, sha256_file, write_json

IDENTITY = {"seed": 0, "data": "abc", "training": {"lr": 1e-3, "betas": (0.9, 0.95), "steps": 7}}

TINY_DISK_MIB = 1


def state(update: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), float(update))}, "update": update, "history": [("a", 1.5)]}


def filled(folder: Path, updates: int = 2, **options: Any) -> Snapshots:
    store = Snapshots(folder, IDENTITY, **options)
    for update in range(1, updates + 1):
        store.save(update, state(update))
    return store


def newest(store: Snapshots) -> int | None:
    """The update of the newest snapshot, whose content must be that update's."""
    latest = store.latest()
    if latest is None:
        return None
    update, found = latest
    assert found["update"] == update
    assert torch.equal(found["model"]["w"], torch.full((3,), float(update)))
    return update


def test_the_newest_comes_back_and_only_some_are_kept(tmp_path: Path) -> None:
    store = Snapshots(tmp_path / "none", IDENTITY)
    assert store.latest() is None
    assert not (tmp_path / "none").exists(), "looking makes nothing"
    for keep in (1, 3):
        store = filled(tmp_path / str(keep), 12, keep=keep)
        names = [f"update-{update:06d}" for update in range(13 - keep, 13)]
        assert sorted(os.listdir(store.folder)) == names
        assert newest(store) == 12
    store.save(1_000_000, state(1_000_000))
    assert newest(Snapshots(store.folder, json.loads(json.dumps(IDENTITY)))) == 1_000_000


def test_an_optimizer_comes_back_exactly(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95))
    weight.sum().backward()
    optimizer.step()
    Snapshots(tmp_path, {}).save(1, {"optimizer": optimizer.state_dict()})
    _, found = Snapshots(tmp_path, {}).latest() or (0, {})
    copy = torch.optim.AdamW([torch.nn.Parameter(weight.detach().clone())], lr=0.5)
    copy.load_state_dict(found["optimizer"])
    assert copy.param_groups[0]["betas"] == (0.9, 0.95)
    assert copy.param_groups[0]["lr"] == 0.1
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(copy.state_dict()["state"][0][name], value), name


def _flip_a_bit(place: Path) -> None:
    content = bytearray((place / STATE).read_bytes())
    content[len(content) // 2] ^= 1
    (place / STATE).write_bytes(content)


def _cut(place: Path) -> None:
    os.truncate(place / STATE, 100)


def _lose_the_state(place: Path) -> None:
    (place / STATE).unlink()


def _tear_the_record(place: Path) -> None:
    (place / RECORD).write_text((place / RECORD).read_text()[:30])


def _lose_the_record(place: Path) -> None:
    (place / RECORD).unlink()


def _write_nonsense(place: Path) -> None:
    (place / RECORD).write_text("[1, 2]")


DAMAGES = [_flip_a_bit, _cut, _lose_the_state, _tear_the_record, _lose_the_record, _write_nonsense]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    store = filled(tmp_path)
    damage(tmp_path / "update-000002")
    with caplog.at_level(logging.WARNING):
        assert newest(store) == 1
    assert "update-000002 is damaged" in caplog.text
    store.save(2, state(2))
    assert newest(store) == 2
    for name in os.listdir(tmp_path):
        damage(tmp_path / name)
    assert store.latest() is None


def test_later_snapshots_of_a_run_that_was_continued_from_before_them_go(tmp_path: Path) -> None:
    store = filled(tmp_path, 3, keep=2)
    _cut(tmp_path / "update-000003")
    store.keep = 1
    store.save(2, state(2))
    assert os.listdir(tmp_path) == ["update-000002"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "seed is 0 in the snapshot and 1 in this run"),
        ({"data": "xyz"}, "data is 'abc' in the snapshot and 'xyz' in this run"),
        (
            {"training": {"lr": 2e-3, "betas": [0.9, 0.95], "steps": 7}},
            "training.lr is 0.001 in the snapshot and 0.002",
        ),
        ({"training": {"lr": 1e-3, "betas": [0.9, 0.95]}}, "training.steps is 7 in the snapshot and None in this run"),
        ({"more": True}, "more is None in the snapshot and True in this run"),
    ],
)
def test_another_runs_snapshot_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    filled(tmp_path)
    with pytest.raises(SnapshotError) as refused:
        Snapshots(tmp_path, IDENTITY | change).latest()
    assert str(refused.value).startswith(f"{tmp_path}/update-000002: {complaint}")
    assert "remove the folder" in str(refused.value)


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = filled(tmp_path / "s")
    place = tmp_path / "s" / "update-000002"
    save_plainly = partial(torch.save, {"x": Payload()}, _use_new_zipfile_serialization=False)
    for write in (partial(torch.save, {"x": Payload()}), save_plainly):
        write(place / STATE)
        record = json.loads((place / RECORD).read_text())
        write_json(place / RECORD, record | {"sha256": sha256_file(place / STATE)})
        assert newest(store) == 1
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "harmed").exists(), "the payload works"


def _save_and_stop(folder: Path, moment: str, ready: Path) -> None:
    """Begin the third snapshot and stop at ``moment``."""

    def stop(*_: Any, **__: Any) -> None:
        ready.touch()
        time.sleep(60)

    real = torch.save

    def half(value: Any, path: Path) -> None:
        real(value, path)
        os.truncate(path, path.stat().st_size // 2)
        stop()

    if moment == "half of the state":
        snapshots.torch.save = half  # type: ignore[attr-defined]
    elif moment == "before the record":
        snapshots.write_json = stop  # type: ignore[attr-defined]
    else:
        snapshots.remove = stop  # type: ignore[attr-defined]
    Snapshots(folder, IDENTITY).save(3, state(3))


@pytest.mark.parametrize(
    ("moment", "left"), [("half of the state", 2), ("before the record", 2), ("before the old one goes", 3)]
)
def test_kill_9_while_saving_leaves_a_usable_snapshot(tmp_path: Path, moment: str, left: int) -> None:
    folder, ready = tmp_path / "snapshots", tmp_path / "ready"
    store = filled(folder)
    writer = multiprocessing.get_context("fork").Process(target=_save_and_stop, args=(folder, moment, ready))
    writer.start()
    while not ready.exists():
        assert writer.is_alive(), "it ended before its moment"
        time.sleep(0.01)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    assert len(os.listdir(folder)) == 3, "two snapshots and what the killed writer left"
    assert newest(store) == left
    store.save(3, state(3))
    assert sorted(os.listdir(folder)) == ["update-000002", "update-000003"]
    assert newest(store) == 3


def test_a_full_disk_keeps_what_was_saved(tiny_disk: Path) -> None:
    store = filled(tiny_disk)
    with pytest.raises(StorageError, match=rf"^{tiny_disk}/update-000003: cannot write: .*MiB free there"):
        store.save(3, {"model": torch.zeros(1 << 19)})
    assert sorted(os.listdir(tiny_disk)) == ["update-000001", "update-000002"]
    assert newest(store) == 2
    store.save(3, state(3))
    assert newest(store) == 3


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/update-000001: cannot write"):
        Snapshots(tmp_path / "file", {}).save(1, {})
