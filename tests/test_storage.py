"""Files appear whole or not at all, whatever interrupts the writer: an error, kill -9, a full disk. S3 against moto."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from s3_server import BUCKET
from safetensors.torch import save_file

from matvlm import storage
from matvlm.storage import MissingError, StorageError, s3

TINY_DISK_MIB = 2


def test_bytes_and_json_come_back(tmp_path: Path) -> None:
    target = storage.join(str(tmp_path), "deep/", "/folder", "value.json")
    assert target == f"{tmp_path}/deep/folder/value.json"
    assert not storage.exists(target)
    storage.write_json(target, {"é": [1, 2.5, None]})
    storage.write_json(target, {"é": [3]})
    assert storage.read_json(target) == {"é": [3]}
    assert storage.list_files(str(tmp_path)) == ["deep/folder/value.json"]
    assert storage.local_copy(target) == Path(target)
    assert [path.name for path in Path(target).parent.iterdir()] == ["value.json"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    torn = tmp_path / "torn.json"
    torn.write_text('{"a": 1')
    with pytest.raises(StorageError, match=r"torn\.json: not valid JSON"):
        storage.read_json(torn)
    with pytest.raises(MissingError, match=r"none\.json: cannot read: No such file"):
        storage.read_json(tmp_path / "none.json")
    with pytest.raises(MissingError, match=r"none: no such file or folder"):
        storage.local_copy(tmp_path / "none")
    with pytest.raises(StorageError, match="neither a local path nor s3"):
        storage.exists("gs://bucket/key")
    with pytest.raises(StorageError, match="pass the URI as text"):
        storage.exists(Path("s3://bucket/key"))
    with pytest.raises(StorageError, match=r"torn\.json/below: cannot read: Not a directory") as refused:
        storage.read_bytes(torn / "below")
    assert not isinstance(refused.value, MissingError)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StorageError, match=r"loop: cannot list: Too many levels of symbolic links"):
        storage.list_files(tmp_path / "loop")
    assert storage.list_files(tmp_path / "none") == storage.list_files(torn) == []
    torn.chmod(0o644)
    with pytest.raises(StorageError, match=r"below: cannot write: (Not a directory|File exists)"):
        storage.write_bytes(torn / "below", b"")


def test_an_error_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "state.bin"
    target.write_bytes(b"old")

    def fail_halfway() -> None:
        with storage.atomic_path(target) as path:
            path.write_bytes(b"half of the n")
            assert path.suffix == ".bin"
            assert storage.list_files(tmp_path) == ["state.bin"]
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        fail_halfway()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for names in (["a", "b"], ["c"]):
        with storage.atomic_folder(target) as folder:
            assert not list(folder.iterdir())
            for name in names:
                storage.write_bytes(folder / "sub" / name, name.encode())
            assert not (target / "sub" / names[0]).exists()
    assert storage.list_files(target) == ["sub/c"]
    storage.put(target, tmp_path / "copy")
    assert storage.list_files(tmp_path) == ["copy/sub/c", "model/sub/c"]
    storage.put(target / "sub" / "c", tmp_path / "copy")
    assert storage.read_bytes(tmp_path / "copy") == b"c"
    storage.remove(target)
    storage.remove(target)
    assert os.listdir(tmp_path) == ["copy"]


def _write_slowly(target: Path, ready: Path) -> None:
    with storage.atomic_path(target) as path:
        path.write_bytes(b"half")
        ready.touch()
        time.sleep(60)


def test_remains_of_a_killed_writer_are_not_seen_and_are_cleared(tmp_path: Path) -> None:
    target, ready = tmp_path / "folder" / "shard[1].bin", tmp_path / "ready"
    writer = multiprocessing.get_context("fork").Process(target=_write_slowly, args=(target, ready))
    writer.start()
    while not ready.exists():
        time.sleep(0.01)
    storage.write_bytes(target.with_name("shard[1]"), b"another")
    storage.write_bytes(target, b"first")
    hidden = [name for name in os.listdir(target.parent) if name.startswith(".")]
    assert len(hidden) == 1, "the remains of a living writer must stay"
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    assert storage.list_files(tmp_path) == ["folder/shard[1]", "folder/shard[1].bin", "ready"]
    assert hidden[0] in os.listdir(target.parent)
    storage.write_bytes(target, b"second")
    assert sorted(os.listdir(target.parent)) == ["shard[1]", "shard[1].bin"]
    assert target.read_bytes() == b"second"


def test_remains_of_every_name_are_cleared_but_not_those_of_a_living_writer(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    storage.clear_unfinished(folder)
    assert not folder.exists()
    writers = []
    for name in ("a", "b"):
        target, ready = folder / name, tmp_path / f"ready-{name}"
        writers.append(multiprocessing.get_context("fork").Process(target=_write_slowly, args=(target, ready)))
        writers[-1].start()
        while not ready.exists():
            time.sleep(0.01)
    storage.write_bytes(folder / ".mine", b"not one of ours")
    os.kill(writers[0].pid or 0, signal.SIGKILL)
    writers[0].join()
    storage.clear_unfinished(folder)
    left = sorted(os.listdir(folder))
    assert len(left) == 2
    assert left[0].startswith(".b.unfinished-")
    assert left[1] == ".mine"
    os.kill(writers[1].pid or 0, signal.SIGKILL)
    writers[1].join()
    storage.clear_unfinished(folder)
    assert os.listdir(folder) == [".mine"]


def _write_many(target: Path, worker: int) -> None:
    for turn in range(40):
        storage.write_json(target, {"worker": worker, "turn": turn, "filler": "x" * 5000})


def test_concurrent_writers_of_one_name_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(target, worker)) for worker in range(3)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        if target.exists():
            assert len(storage.read_json(target)["filler"]) == 5000
            reads += 1
    assert reads
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["value.json"]


def test_a_folder_cleared_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, cleared = os.open, []

    def open_and_lose_the_first(path: str | Path, *rest: int, **options: int) -> int:
        descriptor = real(path, *rest, **options)
        if not cleared and ".unfinished-" in str(path):
            cleared.append(path)
            shutil.rmtree(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_lose_the_first)
    storage.write_bytes(tmp_path / "state", b"whole")
    assert cleared
    assert storage.read_bytes(tmp_path / "state") == b"whole"


def _save_safetensors(path: Path) -> None:
    save_file({"weight": torch.zeros(1 << 20)}, path)


def _save_torch(path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 20)}, path)


def _save_bytes(path: Path) -> None:
    path.write_bytes(bytes(4 << 20))


@pytest.mark.parametrize("save", [_save_bytes, _save_safetensors, _save_torch])
def test_a_full_disk_is_one_clear_error(tiny_disk: Path, save: Callable[[Path], None]) -> None:
    target = tiny_disk / "weights"
    storage.write_bytes(target, b"old")
    with (
        pytest.raises(StorageError, match=rf"^{target}: cannot write: .* \(\d\.\d MiB free there\)"),
        storage.atomic_path(target) as path,
    ):
        save(path)
    assert target.read_bytes() == b"old"
    assert os.listdir(tiny_disk) == ["weights"]
    storage.write_bytes(target, bytes(1 << 20))


def test_a_file_size_limit_is_one_clear_error(tmp_path: Path) -> None:
    program = (
        "import resource, signal, sys; from matvlm import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: storage.write_bytes(sys.argv[1], bytes(5000))\n"
        "except storage.StorageError as error: print(error)\n"
    )
    target = tmp_path / "state"
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, check=True)
    assert f"{target}: cannot write: File too large" in done.stdout
    assert not list(tmp_path.iterdir())


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert storage.sha256_file(tmp_path / "file") == known


def test_s3_files(bucket: str) -> None:
    target = storage.join(bucket, "runs", "7", "value.json")
    assert not storage.exists(target)
    storage.write_json(target, {"é": 1})
    storage.write_bytes(storage.join(bucket, "runs/77/x"), b"x")
    assert storage.read_json(target) == {"é": 1}
    assert storage.exists(storage.join(bucket, "runs/7"))
    assert storage.list_files(storage.join(bucket, "runs/7")) == ["value.json"]
    assert storage.list_files(storage.join(bucket, "runs/")) == ["7/value.json", "77/x"]
    storage.remove(storage.join(bucket, "runs/7"))
    assert storage.list_files(storage.join(bucket, "runs")) == ["77/x"]


def test_s3_folder_goes_up_and_comes_down_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(bucket, "runs", "model")
    source = tmp_path / "model"
    for name in ("config.json", "sub/weights.bin", "tokenizer.json"):
        storage.write_bytes(source / name, name.encode())
    storage.put(source, uri)
    copy = storage.local_copy(uri)
    assert copy.name == "model"
    assert storage.list_files(copy) == ["config.json", "sub/weights.bin", "tokenizer.json"]
    assert (copy / "sub" / "weights.bin").read_bytes() == b"sub/weights.bin"
    assert storage.local_copy(storage.join(uri, "config.json")).read_bytes() == b"config.json"

    modified = (copy / "config.json").stat().st_mtime_ns
    assert storage.local_copy(uri) == copy
    assert (copy / "config.json").stat().st_mtime_ns == modified

    (source / "sub" / "weights.bin").write_bytes(b"new")
    (source / "tokenizer.json").unlink()
    sent: list[str] = []
    real = s3._client().upload_file
    monkeypatch.setattr(s3._client(), "upload_file", lambda path, *to: (sent.append(Path(path).name), real(path, *to)))
    storage.put(source, uri)
    assert sent == ["weights.bin", "config.json"], "readers look for the JSON file, so it goes last"
    fresh = storage.local_copy(uri)
    assert fresh != copy
    assert storage.list_files(fresh) == ["config.json", "sub/weights.bin"]
    assert (fresh / "sub" / "weights.bin").read_bytes() == b"new"


def test_s3_folder_is_made_whole_without_litter(bucket: str, tmp_path: Path) -> None:
    uri = storage.join(bucket, "runs", "folder")
    with storage.atomic_folder(uri) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "weights.bin").write_bytes(b"1234")
        assert not storage.exists(uri)
    assert storage.list_files(uri) == ["config.json", "weights.bin"]
    with storage.passing_copy(storage.join(uri, "weights.bin")) as copy:
        assert copy.read_bytes() == b"1234"
    assert not copy.exists()
    with pytest.raises(KeyError), storage.atomic_folder(uri):
        raise KeyError("interrupted")
    assert storage.list_files(uri) == ["config.json", "weights.bin"]
    assert not os.listdir(tmp_path / "cache")


def test_s3_parts_of_an_upload_that_did_not_end_are_dropped(bucket: str) -> None:
    client = s3._client()
    for key in ("runs/7/state", "runs/77/state"):
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
    storage.clear_unfinished(storage.join(bucket, "runs/7"))
    left = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert [upload["Key"] for upload in left] == ["runs/77/state"]


def test_s3_errors_are_named(bucket: str) -> None:
    missing = storage.join(bucket, "runs/none")
    with pytest.raises(MissingError, match=r"s3://matvlm-test/runs/none: cannot read: .*NoSuchKey"):
        storage.read_bytes(missing)
    with pytest.raises(MissingError, match="runs/none: no such object or folder"):
        storage.local_copy(missing)
    with pytest.raises(MissingError, match=r"runs/none: cannot download: .*Not Found"), storage.passing_copy(missing):
        pytest.fail("there is none")
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/key: cannot write: .*NoSuchBucket") as refused:
        storage.write_json("s3://no-such-bucket/key", json.loads("[]"))
    assert not isinstance(refused.value, MissingError)
    with pytest.raises(StorageError, match="expected s3://bucket/key"):
        storage.exists("s3://bucket")
