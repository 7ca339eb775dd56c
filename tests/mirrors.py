"""Mirrors of one run for tests: as several machines have them, with what is in them and what is asked of S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matvlm import storage
from matvlm.storage import Mirror, s3

RUN = "runs/r-1"
LIST = ".mirror/data/files.json"
Files = dict[str, bytes]
Machine = Callable[[str], Mirror]
OLD: Files = {"a": b"1", "b": b"22", "sub/c": b"333"}
NEW: Files = {"a": b"one", "sub/c": b"333", "d/e": b"4444"}


def write(folder: Path, files: Files) -> None:
    """Make ``files`` all that is in ``folder``."""
    for name in set(storage.list_files(folder)) - files.keys():
        (folder / name).unlink()
    for name, content in files.items():
        storage.write_bytes(folder / name, content)


def read(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in storage.list_files(folder)}


@contextmanager
def before_requests(act: Callable[[str, str], Any]) -> Iterator[None]:
    """Calls ``act`` with method and URL of every request that this process sends S3 while the block lasts.

    If it returns an answer, that is S3's.
    """

    def tell(request: Any, **_: Any) -> Any:
        return act(request.method, request.url)

    events = s3._client().meta.events
    events.register("before-send.s3", tell)
    try:
        yield
    finally:
        events.unregister("before-send.s3", tell)
