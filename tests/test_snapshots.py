"""Snapshots are whole or not there, believed only with their checksum, and bound to what made them."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pickle
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from matvlm import snapshots
from matvlm.snapshots import RECORD, STATE, SnapshotError, Snapshots, cpu_copy, sealed
from matvlm.storage import StorageError, sha256_file, write_json

IDENTITY = {"seed": 0, "data": "abc", "training": {"lr": 1e-3, "betas": (0.9, 0.95), "steps": 7}}

TINY_DISK_MIB = 1


def state(update: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3,), float(update))}, "update": update, "history": [("a", 1.5)]}


def write(store: Snapshots, update: int, **score: float) -> None:
    store.save(update, state(update), **score)
    store.wait()


def filled(folder: Path, updates: int = 2, **options: Any) -> Snapshots:
    store = Snapshots(folder, IDENTITY, **options)
    for update in range(1, updates + 1):
        write(store, update)
    return store


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def places(*updates: int) -> list[str]:
    return [f"update-{update:06d}" for update in updates]


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
        assert names(tmp_path / str(keep)) == places(*range(13 - keep, 13))
        assert newest(store) == 12
    write(store, 1_000_000)
    assert newest(Snapshots(store.folder, json.loads(json.dumps(IDENTITY)))) == 1_000_000


def test_an_optimizer_comes_back_exactly(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95))
    weight.sum().backward()
    optimizer.step()
    with Snapshots(tmp_path, {}) as store:
        store.save(1, cpu_copy({"optimizer": optimizer.state_dict()}))
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
    write(store, 2)
    assert newest(store) == 2
    for name in os.listdir(tmp_path):
        damage(tmp_path / name)
    assert store.latest() is None


@pytest.mark.parametrize("name", [STATE, RECORD])
def test_any_flipped_byte_of_the_newest_is_found(tmp_path: Path, name: str) -> None:
    """One in the identity does not pass for another recipe, nor one in the score for a better snapshot."""
    store = Snapshots(tmp_path, IDENTITY)
    write(store, 1, score=0.5)
    write(store, 2, score=0.25)
    file = tmp_path / "update-000002" / name
    content = file.read_bytes()
    for place in range(0, len(content), max(1, len(content) // 200)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        reader = Snapshots(tmp_path, IDENTITY)
        assert newest(reader) == 1, place
        assert reader.best() == (1, 0.5)
    file.write_bytes(content)
    assert newest(store) == 2


def test_a_damaged_snapshot_takes_no_place_among_those_kept(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    write(store, 2, score=0.5)
    _flip_a_bit(tmp_path / "update-000002")
    assert newest(store) == 1
    assert store.best() is None
    write(store, 4, score=0.7)
    assert names(tmp_path) == places(1, 4)
    assert store.best() == (4, 0.7)


@pytest.mark.parametrize("name", ["read_bytes", "sha256_file"])
def test_a_snapshot_out_of_reach_is_not_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Else a moment without permission or network would start a run over, and its first snapshot would end the rest."""
    store = filled(tmp_path)
    number, real = errno.EACCES, getattr(snapshots, name)

    def fail_for_the_newest(path: str | Path) -> Any:
        if "update-000002" in str(path):
            raise OSError(number, os.strerror(number))
        return real(path)

    monkeypatch.setattr(snapshots, name, fail_for_the_newest)
    with pytest.raises(StorageError, match=r"update-000002/(state\.pt|snapshot\.json): cannot read: Permission denied"):
        store.latest()
    number = errno.EIO
    assert newest(store) == 1, "a bad sector is damage"


def test_later_snapshots_of_a_run_that_was_continued_from_before_them_go(tmp_path: Path) -> None:
    store = filled(tmp_path, 3, keep=2)
    _cut(tmp_path / "update-000003")
    store.keep = 1
    write(store, 2)
    assert names(tmp_path) == places(2)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    store = Snapshots(tmp_path, IDENTITY, keep=2)
    assert store.best() is None
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [5, 6]}
    best = {1: None, 2: (2, 0.5), 3: (2, 0.5), 4: (2, 0.5), 5: (2, 0.5), 6: (6, -1.0)}
    for update, score in enumerate([None, 0.5, 0.75, None, 0.625, -1], start=1):
        store.save(update, state(update), score)
        store.wait()
        assert names(tmp_path) == places(*kept[update])
        assert store.best() == best[update]
    assert json.loads((tmp_path / "update-000006" / RECORD).read_text())["score"] == -1.0
    assert json.loads((tmp_path / "update-000005" / RECORD).read_text())["score"] == 0.625
    assert Snapshots(tmp_path, IDENTITY).best() == (6, -1.0)
    assert Snapshots(tmp_path, {"another": 1}).best() is None
    write(store, 3)
    assert names(tmp_path) == places(3), "the best is of a future that did not happen"
    for score in (math.nan, math.inf):
        with pytest.raises(ValueError, match="update-000007: a score must be finite"):
            store.save(7, state(7), score)


def test_equal_scores_keep_the_newer(tmp_path: Path) -> None:
    store = Snapshots(tmp_path, IDENTITY, keep=1)
    for update in (1, 2):
        write(store, update, score=0.5)
    assert store.best() == (2, 0.5)
    assert names(tmp_path) == places(2)


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
    for save in (partial(torch.save, {"x": Payload()}), save_plainly):
        save(place / STATE)
        record = json.loads((place / RECORD).read_text())
        write_json(place / RECORD, sealed(record | {"sha256": sha256_file(place / STATE)}))
        assert newest(store) == 1
    assert not (tmp_path / "harmed").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "harmed").exists(), "the payload works"


def test_a_full_disk_keeps_what_was_saved(tiny_disk: Path) -> None:
    store = filled(tiny_disk)
    big = {"model": torch.zeros(1 << 19)}
    complaint = rf"^{tiny_disk}/update-000003: cannot write: .*MiB free there"
    store.save(3, big)
    assert newest(store) == 2, "looking waits for the write and does not raise its error"
    with pytest.raises(StorageError, match=complaint):
        store.save(4, state(4))
    assert names(tiny_disk) == places(1, 2)
    write(store, 4)
    assert newest(store) == 4
    store.save(3, big)
    with pytest.raises(StorageError, match=complaint):
        store.close()
    assert newest(store) == 4


def test_an_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"file/update-000001: cannot write"),
        Snapshots(tmp_path / "file", {}) as store,
    ):
        store.save(1, {})


# Beside training


def test_saving_costs_the_training_thread_nothing(tmp_path: Path) -> None:
    """Measured with this state of 128 MiB: 1 ms for ``save``, 870 ms for the write; the longest pause was 23 ms."""
    big = {"weights": [torch.randn(1 << 20) for _ in range(32)]}
    with Snapshots(tmp_path, IDENTITY) as store:
        before = time.perf_counter()
        store.save(1, big)
        saving = time.perf_counter() - before
        pauses, last = [], time.perf_counter()
        while not (tmp_path / "update-000001").exists():
            time.sleep(0.001)
            pauses.append(time.perf_counter() - last)
            last = time.perf_counter()
        writing = last - before
        print(f"save {saving * 1e3:.2f} ms, write {writing * 1e3:.0f} ms, longest pause {max(pauses) * 1e3:.0f} ms")
    assert saving < writing / 20
    assert max(pauses) < writing / 2, "serialising, hashing and writing leave the interpreter to the training"


class Gate:
    """Lets writes pass one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.writing, self.most = threading.Semaphore(0), 0, 0
        real = torch.save

        def save(*arguments: Any) -> None:
            self.writing += 1
            self.most = max(self.most, self.writing)
            assert self.opened.acquire(timeout=20)
            real(*arguments)
            self.writing -= 1

        monkeypatch.setattr(torch, "save", save)


def test_one_write_at_a_time_and_the_state_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Snapshots(tmp_path, IDENTITY) as store:
        changed_too_late = state(1)
        store.save(1, changed_too_late)
        changed_too_late["model"]["w"].fill_(7.0)
        second = threading.Thread(target=store.save, args=(2, state(2)))
        second.start()
        second.join(timeout=0.2)
        assert second.is_alive(), "it waits for the first"
        gate.opened.release()
        second.join(timeout=20)
        assert not second.is_alive()
        assert names(tmp_path)[-1] == "update-000001"
        gate.opened.release()
    assert gate.most == 1
    assert names(tmp_path) == places(1, 2)
    assert torch.load(tmp_path / "update-000001" / STATE)["model"]["w"].tolist() == [7.0] * 3


def save_and_fail(store: Snapshots, error: type[BaseException]) -> None:
    with store:
        store.save(1, state(1))
        raise error


def test_leaving_waits_for_the_write_also_with_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        threading.Timer(0.1, gate.opened.release).start()
        store = Snapshots(tmp_path / error.__name__, IDENTITY)
        with pytest.raises(error):
            save_and_fail(store, error)
        assert names(tmp_path / error.__name__) == places(1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            store.save(2, state(2))


def test_the_error_of_a_write_does_not_hide_the_error_that_passes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZeroDivisionError):
        save_and_fail(Snapshots(tmp_path / "file", IDENTITY), ZeroDivisionError)
    assert f"could not be written either: {tmp_path}/file/update-000001: cannot write" in caplog.text


def test_any_error_of_a_write_keeps_its_type(tmp_path: Path) -> None:
    with Snapshots(tmp_path, IDENTITY) as store:
        store.save(1, {"model": (value for value in ())})
        with pytest.raises(TypeError, match="cannot pickle 'generator' object"):
            store.wait()
        store.wait()
    assert not names(tmp_path)


def test_cpu_copy_shares_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    given = {"a": [weight, (1, "x")], 3: {"b": torch.arange(2)}}
    copy = cpu_copy(given)
    weight.data.fill_(5.0)
    given["a"].append(None)
    assert copy["a"][0].tolist() == [1.0, 1.0]
    assert type(copy["a"][0]) is torch.Tensor
    assert not copy["a"][0].requires_grad
    assert copy["a"][1:] == [(1, "x")]
    assert copy[3]["b"].tolist() == [0, 1]
