"""A mirrored folder: what its writer pushes is what readers get, in full or not at all. S3 against moto."""

from __future__ import annotations

import io
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import s3_server
from botocore.awsrequest import AWSResponse
from mirrors import LIST, NEW, OLD, Machine, before_requests, read, write
from urllib3 import HTTPResponse

from matvlm import storage
from matvlm.storage import Mirror, MissingError, StorageError, mirror, s3


def test_a_local_folder_is_its_own_mirror(tmp_path: Path) -> None:
    with Mirror(str(tmp_path / "run")) as local:
        assert local.folder == tmp_path / "run"
        part = local.open("distill", "aligned")
        assert part == local.fetch("distill", "aligned") == tmp_path / "run" / "distill" / "aligned"
        assert part.parent.is_dir()
        assert not part.exists()
        write(part, OLD)
        assert local.uri_of(part) == str(part)
    assert storage.list_files(tmp_path) == [f"run/distill/aligned/{name}" for name in OLD]
    with pytest.raises(StorageError, match="neither a local path nor s3"):
        Mirror("gs://bucket/run")


def test_what_is_pushed_is_what_others_fetch(run: str, machine: Machine) -> None:
    files = {**OLD, "empty": b"", "a name/ü+%&.bin": b"odd", "large": random.Random(0).randbytes(9 << 20)}
    writer = machine("a")
    part = writer.open("deep", "data")
    write(part, files)
    write(writer.folder / "other", {"not": b"opened"})
    (part / ".x.unfinished-1").mkdir()
    (part / ".x.unfinished-1" / "x").write_bytes(b"half")
    writer.push()
    listed = json.loads(storage.read_bytes(storage.join(run, ".mirror/deep/data/files.json")))["files"]
    assert {name: file["size"] for name, file in listed.items()} == {name: len(files[name]) for name in files}
    assert storage.list_files(storage.join(run, "deep/data")) == sorted(files)
    assert not storage.exists(storage.join(run, "other"))

    reader = machine("b")
    assert reader.folder != writer.folder
    assert read(reader.fetch("deep", "data")) == files
    shutil.rmtree(part)
    assert read(machine("a").open("deep", "data")) == files

    write(part, OLD)
    writer.push()
    assert read(reader.fetch("deep", "data")) == OLD
    assert not (reader.folder / "deep/data/a name").exists()
    assert storage.list_files(run) == [".mirror/deep/data/files.json", *(f"deep/data/{name}" for name in OLD)]


def test_only_what_differs_travels(machine: Machine) -> None:
    writer = machine("a")
    part = writer.open("data")
    write(part, OLD)
    writer.push()
    reader = machine("b")
    reader.fetch("data")
    inode = (reader.folder / "data/b").stat().st_ino
    sent: list[str] = []
    with before_requests(lambda method, url: sent.append(f"{method} {url.rpartition('/')[2]}")):
        writer.push()
        assert sent == ["GET files.json"]
        write(part, {**OLD, "a": b"1+1"})
        writer.push()
        assert sum(name.startswith("PUT") for name in sent) == 4  # the file and its copy, and the list for each
        sent.clear()
        assert read(reader.fetch("data"))["a"] == b"1+1"
    assert [name for name in sent if name.startswith("GET")] == ["GET files.json", "GET a"]
    assert (reader.folder / "data/b").stat().st_ino == inode


def test_names_of_both_sides_fit(run: str, machine: Machine, tmp_path: Path) -> None:
    writer = machine("a")
    assert writer.folder == (tmp_path / "a" / storage.folder_name(run)).resolve()
    for parts in ((), ("data",), ("distill", "aligned", "model.bin")):
        path, uri = writer.folder.joinpath(*parts), storage.join(run, *parts)
        assert writer.uri_of(path) == uri
    assert Mirror(f"{run}/").folder == writer.folder
    for outside in (writer.folder.parent, writer.folder / ".." / "x", tmp_path):
        with pytest.raises(StorageError, match="not in the folder"):
            writer.uri_of(outside)
    with pytest.raises(MissingError):
        storage.read_bytes(storage.join(run, LIST))


@pytest.mark.parametrize("part", [("..", "x"), ("/etc",), ("a", ""), ("",), (), ("a/",), (".",)], ids=str)
def test_a_part_is_a_folder_below(machine: Machine, part: tuple[str, ...]) -> None:
    with pytest.raises(StorageError, match="is no folder below it"):
        machine("a").open(*part)


def test_parts_do_not_overlap(machine: Machine) -> None:
    writer = machine("a")
    writer.open("init", "aligned")
    writer.open("init", "random")
    for parts in (("init",), ("init", "aligned", "model")):
        with pytest.raises(StorageError, match="lie in one another"):
            writer.open(*parts)
        with pytest.raises(StorageError, match="lie in one another"):
            writer.fetch(*parts)
    assert writer.fetch("init", "aligned") == writer.open("init", "aligned")


def test_a_retry_starts_from_the_last_push_on_any_machine(run: str, machine: Machine) -> None:
    first = machine("a")
    write(first.open("data"), OLD)
    first.push()
    write(first.folder / "data", NEW)  # and killed before it is pushed
    write(first.folder / "never", NEW)
    for name in ("a", "b"):
        retry = machine(name)
        assert read(retry.open("data")) == OLD
        assert not (retry.folder / "data/d").exists()
    assert read(machine("a").fetch("never")) == NEW
    assert read(machine("b").fetch("never")) == {}
    again = machine("a")
    write(again.open("data"), NEW)
    assert read(again.open("data")) == read(again.fetch("data")) == NEW, "an open part is as its writer leaves it"
    again.push()
    assert read(machine("b").fetch("data")) == NEW


def test_two_writers_of_two_parts_and_their_readers(machine: Machine) -> None:
    writers = [machine("a"), machine("b")]
    parts = [writer.open("distill", str(number)) for number, writer in enumerate(writers)]
    for number, part in enumerate(parts):
        write(part, {"own": b"%d" % number})
    writers[0].push()
    assert read(writers[1].fetch("distill", "0")) == {"own": b"0"}
    writers[1].push()
    assert read(writers[0].fetch("distill", "1")) == {"own": b"1"}
    assert [read(part) for part in parts] == [{"own": b"0"}, {"own": b"1"}]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a/./b", "a//b", "", ".", "a/", "link/x", "a\0b"])
def test_a_listed_name_does_not_lead_out(run: str, machine: Machine, tmp_path: Path, name: str) -> None:
    storage.write_json(storage.join(run, LIST), {"files": {name: {"size": 1, "sha256": "0"}}})
    reader = machine("a")
    (reader.folder / "data").mkdir(parents=True)
    (reader.folder / "data" / "link").symlink_to(tmp_path)
    with pytest.raises(StorageError, match=r"runs/r-1/\.mirror/data/files\.json: lists .*, which is no file of the"):
        reader.fetch("data")


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"a": {"size": 1}}}', '{"files": {}, "more": 1}'])
def test_a_damaged_list_is_named(run: str, machine: Machine, text: str) -> None:
    storage.write_bytes(storage.join(run, LIST), text.encode())
    with pytest.raises(StorageError, match=r"\.mirror/data/files\.json: not a list of files: .*; remove the list"):
        machine("a").open("data")


def test_local_trouble_is_named(machine: Machine) -> None:
    writer = machine("a")
    (writer.open("data") / "loop").parent.mkdir()
    (writer.folder / "data" / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match=r"data/loop: cannot read: Too many levels of symbolic links"):
        writer.push()
    (writer.folder / "data" / "loop").unlink()
    write(writer.folder / "data", OLD)
    writer.push()
    blocked = machine("b")
    blocked.folder.parent.mkdir()
    blocked.folder.write_bytes(b"a file")
    with pytest.raises(StorageError, match=r"data: cannot write: (Not a directory|File exists)"):
        blocked.fetch("data")


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def denied(method: str, url: str) -> AWSResponse:
    body = io.BytesIO(b"<Error><Code>AccessDenied</Code></Error>")
    return AWSResponse(url, 403, {}, HTTPResponse(body, preload_content=False))


def test_it_pushes_again_and_again_and_at_the_end(
    run: str, machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mirror, "INTERVAL", 0.05)
    with machine("a") as writer:
        write(writer.open("data"), OLD)
        wait_until(lambda: storage.exists(storage.join(run, "data/sub/c")))
        with before_requests(denied):
            write(writer.folder / "data", NEW)
            wait_until(lambda: "cannot send now, trying again in 0.05 s" in caplog.text)
        wait_until(lambda: storage.exists(storage.join(run, "data/d/e")))
        monkeypatch.setattr(mirror, "INTERVAL", 60)
        time.sleep(0.1)
        write(writer.folder / "data", OLD)
    assert read(machine("b").fetch("data")) == OLD


def test_the_end_of_a_block_with_an_error(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    writer = machine("a")
    write(writer.open("data"), OLD)
    with pytest.raises(KeyError), writer:
        raise KeyError("of the stage")
    assert read(machine("b").fetch("data")) == OLD

    write(writer.folder / "data", NEW)
    with before_requests(denied), pytest.raises(KeyError), writer:
        raise KeyError("of the stage")
    assert "r-1: what is new was not sent: s3://matvlm-test/runs/r-1/.mirror/data" in caplog.text
    with before_requests(denied), pytest.raises(StorageError, match="AccessDenied"), writer:
        pass
    assert read(machine("b").fetch("data")) == OLD
    with writer:
        pass
    assert read(machine("b").fetch("data")) == NEW


def test_one_part_that_cannot_be_sent_does_not_keep_the_others(machine: Machine) -> None:
    writer = machine("a")
    for name in ("bad", "good"):
        write(writer.open(name), OLD)
    (writer.folder / "bad" / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match="bad/loop: cannot read"):
        writer.push()
    assert read(machine("b").fetch("good")) == OLD
    assert read(machine("b").fetch("bad")) == {}


def test_the_parts_of_a_folder_are_those_that_were_pushed(machine: Machine, tmp_path: Path) -> None:
    writer = machine("a")
    for name in ("tracking/distill.0", "tracking/start", "tracked"):
        write(writer.open(name), OLD)
    assert writer.parts("tracking") == []
    writer.push()
    assert machine("b").parts("tracking") == ["tracking/distill.0", "tracking/start"]
    assert Mirror(tmp_path).parts("tracking") == []


def test_a_block_in_another_one_pushes_and_leaves_the_clock_to_it(
    run: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "INTERVAL", 0.05)
    with machine("a") as writer:
        with writer:
            write(writer.open("data"), OLD)
        assert read(machine("b").fetch("data")) == OLD
        write(writer.folder / "data", NEW)
        wait_until(lambda: storage.exists(storage.join(run, "data/d/e")))
    with writer:
        write(writer.folder / "data", OLD)
        wait_until(lambda: not storage.exists(storage.join(run, "data/d/e")))


@pytest.mark.parametrize("key", ["m/../../../up", "m/x/../../side", "m//tmp/absolute", "m/.."])
def test_the_keys_of_a_bucket_lead_nowhere_outside_of_a_copy(bucket: str, tmp_path: Path, key: str) -> None:
    for name in ("m/config.json", key):
        s3._client().put_object(Bucket=s3_server.BUCKET, Key=name, Body=b"{}")
    with pytest.raises(StorageError, match=r"the object .* has no place in a local folder; rename or remove it"):
        storage.local_copy(f"{bucket}/m")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
