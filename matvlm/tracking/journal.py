"""The journal: everything a run tracks, on local disk before anyone else is told.

One JSONL file per step, appended to by one process at a time. Each line is an event with a ``kind`` and a ``time``
(ms since the epoch); the first is an ``open`` event that names the run. Beside it a cursor file says, per tracking URI,
up to which byte the events were delivered, so that a delivery can be interrupted, repeated and sent to another place.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Event = dict[str, Any]

FOLDER = "tracking"


class JournalBusy(Exception):
    """Another process is writing this journal."""


class Journal:
    """An open, locked journal file. The lock goes away with the process, however that ends."""

    def __init__(self, path: Path):
        """Open or create ``path`` and drop a line that a crash left half-written.

        Raises:
            JournalBusy: another process holds it.
            OSError: the file cannot be created.
        """
        self.path = path
        self._unwritten = b""
        self._complained = False
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise JournalBusy(str(path)) from None
        os.ftruncate(self._descriptor, _complete_bytes(path))

    def append(self, kind: str, **fields: Any) -> None:
        """Add one event. What a full disk refuses is kept in memory and written before the next event."""
        event = {"kind": kind, "time": int(time.time() * 1000), **fields}
        self._unwritten += json.dumps(event, ensure_ascii=False).encode() + b"\n"
        try:
            while self._unwritten:
                written = os.write(self._descriptor, self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not self._complained:
                logger.warning("%s: cannot write the journal (%s); keeping events in memory", self.path, error.strerror)
                self._complained = True

    def persist(self) -> None:
        """Ask the disk to keep what was appended, so that it survives a power cut too."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            logger.warning("%s: cannot be flushed to disk: %s", self.path, error.strerror)

    def events(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """Each complete event from byte ``offset`` on, with the byte where it ends."""
        return read_events(self.path, offset)

    def pending(self, uri: str) -> int:
        """How many events ``uri`` has not received."""
        return sum(1 for _ in self.events(self.cursor(uri)))

    def cursor(self, uri: str) -> int:
        """The byte up to which ``uri`` has received this journal."""
        return min(_read_cursors(self._cursor_path).get(uri, 0), self.path.stat().st_size)

    def advance(self, uri: str, offset: int) -> None:
        """Note that ``uri`` has received everything before byte ``offset``. Delivery may repeat, so no fsync."""
        cursors = {**_read_cursors(self._cursor_path), uri: offset}
        temporary = self._cursor_path.with_suffix(".cursor.tmp")
        temporary.write_text(json.dumps(cursors), encoding="utf-8")
        os.replace(temporary, self._cursor_path)

    def close(self) -> None:
        """Persist and let go of the file."""
        if self._descriptor >= 0:
            self.persist()
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _cursor_path(self) -> Path:
        return self.path.with_suffix(".cursor")


def open_journal(folder: Path, name: str) -> Journal:
    """The journal of step ``name``; a numbered one beside it while a process of an earlier attempt still lives.

    Raises:
        OSError: ``folder`` cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        try:
            return Journal(folder / f"{file_name(name)}{f'.{number}' if number else ''}.jsonl")
        except JournalBusy:
            logger.warning("another process is still writing %s; writing beside it", folder / file_name(name))
    raise AssertionError("unreachable")


def journal_paths(folder: Path, name: str | None = None) -> list[Path]:
    """All journals in ``folder`` and its parts, or those of step ``name``, in a fixed order."""
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")])
    if name is None:
        return paths
    own = re.compile(re.escape(file_name(name)) + r"(\.\d+)?\.jsonl")
    return [path for path in paths if own.fullmatch(path.name)]


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[Event, int]]:
    """Each complete event of the file from byte ``offset`` on, with the byte where it ends.

    A last line without its newline is one that is being written, or never will be: it is left out. A damaged line in
    the middle is skipped with a warning.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            offset += len(line)
            if not line.endswith(b"\n"):
                return
            event = _parse(line)
            if event is None:
                logger.warning("%s: skipping a damaged line that ends at byte %d", path, offset)
            else:
                yield event, offset


def file_name(name: str) -> str:
    """``name`` with the characters that do not belong in a file name replaced, and the dots that it begins with."""
    return re.sub(r"^\.+|[^\w.\[\]-]", "_", name)


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "kind" in event and "time" in event else None


def _complete_bytes(path: Path) -> int:
    """The size of ``path`` without a last line that lacks its newline."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1


def _read_cursors(path: Path) -> dict[str, int]:
    """Delivered bytes per URI. A lost or damaged cursor only means that events are sent again."""
    try:
        cursors = json.loads(path.read_text(encoding="utf-8"))
        return {str(uri): int(offset) for uri, offset in cursors.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
