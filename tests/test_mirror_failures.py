"""Mirrors whose writers are killed, whose files change meanwhile and whose network fails: readers get the last push."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import s3_server
from mirrors import LIST, NEW, OLD, Files, Machine, before_requests, read, write

from matvlm import storage
from matvlm.storage import Mirror, MissingError, StorageError, s3
from matvlm.storage.part import Part


def _push_until_killed(run: str, cache: str, request: int) -> None:
    os.environ["MATVLM_CACHE"] = cache
    writer, count = Mirror(run), 0
    part = writer.open("data")
    write(part, NEW)

    def count_down(method: str, url: str) -> None:
        nonlocal count
        count += 1
        if count > request:
            os._exit(9)

    with before_requests(count_down):
        writer.push()


def test_a_writer_killed_at_any_request_leaves_the_old_or_the_new_state(
    run: str, machine: Machine, tmp_path: Path
) -> None:
    states, request, code = [], 0, 9
    while code == 9:
        first = machine(f"first-{request}")
        write(first.open("data"), OLD)
        first.push()
        arguments = (run, str(tmp_path / f"killed-{request}"), request)
        killed = multiprocessing.get_context("fork").Process(target=_push_until_killed, args=arguments)
        killed.start()
        killed.join()
        code = killed.exitcode
        found = read(machine(f"reader-{request}").fetch("data"))
        assert found in (OLD, NEW), request
        states.append(found == NEW)

        retry = machine(f"retry-{request}")
        assert read(retry.open("data")) == found
        write(retry.folder / "data", NEW)
        retry.push()
        assert read(machine(f"reader-{request}").fetch("data")) == NEW
        assert set(storage.list_files(run)) - {"data/b"} == {LIST, *(f"data/{name}" for name in NEW)}
        storage.remove(run)
        request += 1
    assert code == 0
    assert states == sorted(states), "once the list is there it is the new state"
    assert states.count(False) > 3
    assert states.count(True) > 3


def test_what_changes_while_it_is_sent_waits_for_the_next_push(run: str, machine: Machine) -> None:
    writer = machine("a")
    part = writer.open("data")
    for turn in range(2):  # of a new file, then of one that is listed
        write(part, {"log": b"line", "gone": b"soon", "kept": b"%d" % turn})

        def change(method: str, url: str) -> None:
            if method == "PUT" and LIST not in url:
                with (part / "log").open("ab") as log:
                    log.write(b"+")
                (part / "gone").unlink(missing_ok=True)

        before = read(machine("b").fetch("data"))
        with (part / "log").open("ab") as log:
            log.write(b"%d" % turn)
        with before_requests(change):
            writer.push()
        after = read(machine("b").fetch("data"))
        assert after["kept"] == b"%d" % turn
        assert after.get("log") == before.get("log")
        writer.push()
        pushed = read(machine("b").fetch("data"))
        assert pushed == read(part)
        assert pushed.keys() == {"log", "kept"}
    assert storage.list_files(run) == [LIST, "data/kept", "data/log"]


def test_a_part_that_its_writer_changes_meanwhile_is_read_again(machine: Machine) -> None:
    writer, reader = machine("a"), machine("b")
    write(writer.open("data"), OLD)
    writer.push()
    states = [NEW, OLD]

    def change(method: str, url: str) -> None:
        if url.endswith("data/a") and method == "HEAD" and states:
            write(writer.folder / "data", states.pop(0))
            writer.push()

    with before_requests(change):
        assert read(reader.fetch("data")) == OLD
    assert states == []


def test_a_change_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """Which is one of 4 ms for the files of most kernels before 6.13."""
    part = Part("s3://bucket/run", tmp_path, "data")
    part.folder.mkdir()
    with open(part.folder / "file", "wb", buffering=0) as file:
        for turn in range(50):
            file.seek(0)
            file.write(b"%03d" % turn)
            assert part._content("file") == (3, hashlib.sha256(b"%03d" % turn).hexdigest())


def act_at_random(chance: random.Random, folder: Path, state: Files) -> None:
    """One to three files of ``folder`` are written, appended to or removed; ``state`` is told."""
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(["a", "b", "x/a", "x/b", "x/y/c"])
        act = chance.choice(["write", "write in place", "append", "remove"])
        if act == "remove":
            (folder / name).unlink(missing_ok=True)
            state.pop(name, None)
            continue
        content = chance.randbytes(chance.randint(0, 3))
        if act == "append":
            content = state.get(name, b"") + content
        state[name] = content
        if act == "write":
            storage.write_bytes(folder / name, content)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_gives_readers_the_last_push(
    s3_endpoint: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also over a network that fails: with odd seeds one request in ten."""
    chance = random.Random(seed)
    with s3_server.unreliable(s3_endpoint, share=seed % 2 / 10, seed=seed) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
        s3._client_of.cache_clear()
        writer, reader = machine("a"), machine("b")
        part, local, pushed = writer.open("data"), Files(), Files()
        for _ in range(18):
            act = chance.choice(["change", "change", "push", "fetch", "retry"])
            if act == "change":
                act_at_random(chance, part, local)
            elif act == "push":
                writer.push()
                pushed = dict(local)
            elif act == "retry":  # where it was, or on another machine
                writer = machine(chance.choice("ac"))
                part = writer.open("data")
                kept_unlisted = not storage.exists(storage.join(writer.uri, LIST))
                local = read(part) if kept_unlisted else dict(pushed)
            else:
                assert read(reader.fetch("data")) == pushed
            assert read(part) == local
        writer.push()
        assert read(reader.fetch("data")) == local
        assert network.passed > 30
        assert (network.injected.total() > 3) == bool(seed % 2)
    s3._client_of.cache_clear()


def test_the_network_fails_in_every_way_and_large_files_arrive(
    s3_endpoint: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number:02d}": random.Random(number).randbytes(number) for number in range(40)}
    files["large"] = random.Random(0).randbytes(17 << 20)
    with s3_server.unreliable(s3_endpoint, share=0.2, seed=3) as network:
        monkeypatch.setenv("AWS_ENDPOINT_URL", network.url)
        s3._client_of.cache_clear()
        with machine("a") as writer:
            write(writer.open("data"), files)
        assert read(machine("b").fetch("data")) == files
        assert network.injected.keys() == set(s3_server.FAULTS)
    s3._client_of.cache_clear()


def test_a_reader_beside_a_writer_sees_one_push_and_never_two(machine: Machine) -> None:
    writer, reader = machine("a"), machine("b")
    part = writer.open("data")
    writing = threading.Event()

    def write_on() -> None:
        for turn in range(12):
            write(part, dict.fromkeys(("a", "b", "c", f"of-{turn}"), b"%d" % turn))
            writer.push()
        writing.set()

    thread = threading.Thread(target=write_on)
    thread.start()
    seen = set()
    while not writing.is_set():
        with suppress(StorageError):  # it was changed at each attempt
            reader.fetch("data")
        if found := read(reader.folder / "data"):
            turn = found["a"].decode()
            assert found == {name: turn.encode() for name in ("a", "b", "c", f"of-{turn}")}
            seen.add(turn)
    thread.join()
    assert len(seen) > 1
    assert read(reader.fetch("data"))["a"] == b"11"


def test_what_is_not_what_the_list_says_is_refused(run: str, machine: Machine) -> None:
    writer = machine("a")
    write(writer.open("data"), OLD)
    writer.push()
    reader = machine("b")
    reader.fetch("data")
    storage.write_bytes(storage.join(run, "data/b"), b"2!")
    assert read(reader.fetch("data")) == OLD, "it has the right one"
    fresh = machine("c")
    with pytest.raises(StorageError, match=r"r-1/data/b: not the file of 2 bytes and sha256 .* lists; remove both"):
        fresh.fetch("data")
    assert read(fresh.folder / "data") == {}, "nothing of it is used"
    storage.remove(storage.join(run, "data/b"))
    with pytest.raises(MissingError, match=r"r-1/data/b: cannot download"):
        fresh.fetch("data")
    write(writer.folder / "data", NEW)
    writer.push()
    assert read(fresh.fetch("data")) == NEW
