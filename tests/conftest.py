"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mirrors
import pytest
import s3_server
import tiny_chat
import torch

from matvlm.storage import Mirror
from matvlm.tracking.store import open_client

SERVER_START_SECONDS = 90.0  # of MLflow's server; measured: 7.5 s


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread, as a step of the default recipe has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of ``tiny_chat``."""
    made = tmp_path_factory.mktemp("chat")
    tiny_chat.save(made)
    return made


@pytest.fixture
def tiny_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of ``TINY_DISK_MIB`` of the test's module."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.module.TINY_DISK_MIB}m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # lazy: a failed test may hold a file open


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server on loopback."""
    with s3_server.serve() as url:
        yield url


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path) -> Iterator[str]:
    """The URI of an empty bucket there, which this process and those it starts can reach."""
    with s3_server.empty_bucket(s3_endpoint, tmp_path / "cache") as uri:
        yield uri


@pytest.fixture
def run(bucket: str) -> str:
    """The URI of a folder there that nobody has written to."""
    return f"{bucket}/{mirrors.RUN}"


@pytest.fixture
def machine(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mirrors.Machine:
    """Gives a mirror of ``run`` as the machine of a name has it, with a cache of its own."""

    def start(name: str) -> Mirror:
        monkeypatch.setenv("MATVLM_CACHE", str(tmp_path / name))
        return Mirror(run)

    return start


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes about 2 s to create its tables: do it once and copy the file."""
    path = tmp_path_factory.mktemp("database") / "empty.db"
    open_client(f"sqlite:///{path}").get_experiment("0")
    return path


@pytest.fixture
def folder(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run, with an empty MLflow database where it is looked for by default."""
    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts ``mlflow ui`` on a port, in its own process group, and waits until it answers."""
    started: list[subprocess.Popen[str]] = []

    def start_server(port: int) -> subprocess.Popen[str]:
        variables = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
        with (folder / "server.log").open("a") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                text=True,
            )
        started.append(process)
        deadline = time.monotonic() + SERVER_START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                return process
            except OSError:
                time.sleep(0.2)
        raise AssertionError((folder / "server.log").read_text())

    yield start_server
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
