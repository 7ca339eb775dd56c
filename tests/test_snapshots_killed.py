"""kill -9 at any moment of a write, locally and on S3: what was whole before is still there, and the run goes on.

The writers are processes of their own, started by a server process without threads.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from s3_server import BUCKET, variables

from matvlm import storage
from matvlm.snapshots import RECORD, STATE, SnapshotError, Snapshots
from matvlm.storage import StorageError, s3

IDENTITY = {"seed": 0}
KEEP = 2
LOCAL_LIFE, S3_LIFE = 0.2, 0.5
"""Seconds until the kill, at most. One local write takes 35 ms to 70 ms, one to the S3 server 300 ms to 600 ms."""


def state(update: int, mib: int = 9) -> dict[str, Any]:
    """9 MiB are what boto3 sends to S3 in two parts."""
    return {"w": [torch.full((mib, 1 << 16), float(update)) for _ in range(4)], "update": update}


def score(update: int) -> float:
    return update * 3571 % 10007 / 10007


def go_on(folder: str, environment: dict[str, str], report: Connection) -> None:
    """Continue from the last snapshot and write one after the other; ``report`` the number of each that is written."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with Snapshots(folder, IDENTITY, KEEP) as store:
        update = (store.latest() or (0, None))[0]
        while True:
            report.send(update)
            update += 1
            store.save(update, state(update, mib=9 if environment else 2), score(update))
            store.wait()


def stop_in_an_upload(folder: str, environment: dict[str, str], report: Connection, moment: str) -> None:
    """Write snapshot 3 and stop before a request whose URL has ``moment`` in it is sent."""
    os.environ.update(environment)

    def stop(request: Any, **_: Any) -> None:
        if request.method in ("PUT", "POST") and moment in request.url:
            report.send(moment)
            time.sleep(60)

    s3._client().meta.events.register("before-send.s3", stop)
    store = Snapshots(folder, IDENTITY, KEEP)
    store.save(3, state(3))
    store.close()


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "boto3", "matvlm.snapshots"])
    return context


def start(context: ForkServerContext, target: Any, *arguments: Any, **options: Any) -> tuple[BaseProcess, Connection]:
    """The process and the end of its pipe, after its first report."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, theirs), kwargs=options, daemon=True)
    process.start()
    theirs.close()
    assert wait([ours], timeout=60), "it never came to its first report"
    return process, ours


def kill(process: BaseProcess) -> None:
    assert process.is_alive(), "it was still at work"
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()


def reported(pipe: Connection) -> int:
    """The last number, all of them read."""
    last = -1
    try:
        while True:
            last = pipe.recv()
    except EOFError:
        return last


def intact(folder: str) -> int:
    """The number of the newest snapshot, whose content must be whole; 0 if there is none."""
    latest = Snapshots(folder, IDENTITY).latest()
    if latest is None:
        return 0
    update, found = latest
    assert found["update"] == update
    assert all(bool((tensor == update).all()) for tensor in found["w"])
    return update


def second(pair: tuple[int, float]) -> float:
    return pair[1]


def kill_again_and_again(
    context: ForkServerContext, folder: str, environment: dict[str, str], kills: int, longest: float
) -> None:
    moments, before = random.Random(0), 0
    for _ in range(kills):
        process, pipe = start(context, go_on, folder, environment)
        time.sleep(moments.uniform(0.0, longest))
        kill(process)
        if environment:
            time.sleep(0.1)  # what S3 had received whole may still be at work there
        last, found = reported(pipe), intact(folder)
        assert found in (last, last + 1), "the last whole one, or the one after it that could not be reported any more"
        assert found >= before
        best = Snapshots(folder, IDENTITY).best()
        assert best == min(((update, score(update)) for update in range(1, found + 1)), key=second, default=None)
        before = found
    assert before >= kills // 4, "there was hardly anything to kill"
    with Snapshots(folder, IDENTITY, KEEP) as store:
        store.save(before + 1, state(before + 1))
    names = {name.partition("/")[0] for name in storage.list_files(folder)}
    best = Snapshots(folder, IDENTITY).best()
    assert best is not None
    assert names == {f"update-{update:06d}" for update in (best[0], before, before + 1)}


def test_kill_9_at_random_moments(context: ForkServerContext, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "snapshots"
    kill_again_and_again(context, str(folder), {}, kills=20, longest=LOCAL_LIFE)
    assert not caplog.records, "nothing damaged, no snapshot without its record"
    assert not remains(folder)


def remains(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_remains_stay_until_a_writer_comes(context: ForkServerContext, tmp_path: Path) -> None:
    process, _ = start(context, go_on, str(tmp_path), {})
    while not remains(tmp_path):
        os.kill(process.pid or 0, signal.SIGCONT)
        time.sleep(0.003)
        os.kill(process.pid or 0, signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
    with Snapshots(tmp_path, IDENTITY):
        assert remains(tmp_path), "the writer lives"
    kill(process)
    Snapshots(tmp_path, IDENTITY).latest()
    assert remains(tmp_path), "looking changes nothing"
    with Snapshots(tmp_path, IDENTITY):
        assert not remains(tmp_path)


def unfinished() -> list[str]:
    """Keys that parts were sent for and that are not there."""
    return [upload["Key"] for upload in s3._client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


@pytest.mark.parametrize("moment", ["partNumber=2", f"{STATE}?uploadId", RECORD])
def test_s3_kill_9_in_an_upload_leaves_the_one_before(
    context: ForkServerContext,
    s3_endpoint: str,
    bucket: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    folder, cache = storage.join(bucket, "run"), tmp_path / "cache"
    with Snapshots(folder, IDENTITY, KEEP) as store:
        for update in (1, 2):
            store.save(update, state(update))
    assert os.listdir(cache) == []
    environment = variables(s3_endpoint, cache)
    process, _ = start(context, stop_in_an_upload, folder, environment, moment=moment)
    kill(process)
    whole = moment == RECORD
    assert storage.exists(storage.join(folder, "update-000003", STATE)) == whole
    assert unfinished() == ([] if whole else ["run/update-000003/state.pt"])
    assert len(os.listdir(cache)) == 1, "what it wanted to send"
    assert intact(folder) == 2
    with Snapshots(folder, IDENTITY, KEEP) as store:
        assert storage.list_files(folder) == [
            f"update-{update:06d}/{name}" for update in (1, 2) for name in (RECORD, STATE)
        ]
        assert not unfinished()
        assert os.listdir(cache) == []
        store.save(3, state(3))
    assert intact(folder) == 3
    assert ("update-000003 is unfinished" in caplog.text) == whole


def test_s3_kill_9_at_random_moments(context: ForkServerContext, s3_endpoint: str, bucket: str, tmp_path: Path) -> None:
    environment = variables(s3_endpoint, tmp_path / "cache")
    kill_again_and_again(context, storage.join(bucket, "run"), environment, kills=6, longest=S3_LIFE)
    assert not unfinished()


def test_s3_damage_and_another_identity_are_found(bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = storage.join(bucket, "run")
    with Snapshots(folder, IDENTITY, KEEP) as store:
        for update in (1, 2):
            store.save(update, state(update), score(update))
    assert Snapshots(folder, IDENTITY).best() == (1, score(1))
    with pytest.raises(SnapshotError, match=rf"^{folder}/update-000002: seed is 0 in the snapshot and 1 in this run"):
        Snapshots(folder, {"seed": 1}).latest()
    place = storage.join(folder, "update-000002", STATE)
    content = bytearray(storage.read_bytes(place))
    content[len(content) // 2] ^= 1
    storage.write_bytes(place, bytes(content))
    with caplog.at_level(logging.WARNING):
        assert intact(folder) == 1
    assert f"{folder}/update-000002 is damaged (the checksum of state.pt does not fit)" in caplog.text


def test_s3_out_of_reach_is_an_error_and_no_start_from_nothing(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    s3._client_of.cache_clear()
    with pytest.raises(StorageError, match="s3://matvlm-test/run: cannot list: Could not connect"):
        Snapshots(storage.join(bucket, "run"), IDENTITY).latest()
    with pytest.raises(StorageError, match="Could not connect"), Snapshots(f"{bucket}/run", IDENTITY) as store:
        store.save(1, state(1))
    assert "the remains of a killed run stay: s3://matvlm-test/run: cannot list the uploads" in caplog.text
