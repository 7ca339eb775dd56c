"""Fixtures that several test files use."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3_server
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread, as a step of the default recipe has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
