"""Training state at a local or S3 URI, written while training goes on: whole or not there, bound to its recipe.

A snapshot is a folder ``update-000100`` with ``state.pt`` (tensors and plain values, read back with ``weights_only``)
and ``snapshot.json`` (identity, score, and a checksum of the state and of itself). Locally the folder appears when both
are complete. On S3, where a folder is only its objects, ``snapshot.json`` comes last; without it there is no snapshot.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from matvlm.storage import (
    MissingError,
    StorageError,
    atomic_folder,
    clear_unfinished,
    join,
    list_files,
    passing_copy,
    read_bytes,
    remove,
    sha256_file,
    write_json,
)

log = logging.getLogger(__name__)

NAME = re.compile(r"update-(\d+)/(.+)")
STATE, RECORD = "state.pt", "snapshot.json"


class SnapshotError(ValueError):
    """A snapshot that must not be continued from; the message names the folder and the field that differs."""


class Snapshots:
    """The snapshots of one training run in ``folder``: the newest ``keep``, and the best where scores are given.

    One thread of its own writes them. Use it as a context manager, or ``close`` it: that waits for the write in flight
    and raises its error. Entering removes what a killed run left unfinished in ``folder``, so one run at a time may
    write there; looking with ``latest`` or ``best`` changes nothing.

    Args:
        folder: a local path or ``s3://bucket/prefix``.
        identity: everything that a continued run must share with the one that wrote a snapshot, as plain values.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any], keep: int = 2):
        self.folder, self.keep = os.fspath(folder), keep
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: lists for tuples
        self._writer = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshots")
        self._writing: futures.Future[None] | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> Self:
        try:
            self._clear_remains()
        except StorageError as error:
            log.warning("the remains of a killed run stay: %s", error)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except Exception as lost:
            log.error("the last snapshot could not be written either: %s", lost)

    def save(self, update: int, state: dict[str, Any], score: float | None = None) -> None:
        """Start writing ``state`` as the snapshot after ``update`` optimiser updates; what it makes superfluous goes.

        Returns at once if no other write is in flight, else when that one has ended. Later snapshots, of a run that
        went on from an earlier one than this continues, go as well as the oldest, whatever their score.

        Args:
            state: nested dicts, lists and tuples of CPU tensors and plain values. It is not copied and it is read while
                training goes on, so nothing in it may change any more (see ``cpu_copy``).
            score: lower is better, such as a loss on held-out data.

        Raises:
            ValueError: ``score`` is not finite.
            StorageError: the write before this one met a full or unwritable disk, or S3 refused it or could not be
                reached. What was there before is still there, and ``state`` is not written.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"{self._place(update)}: a score must be finite, not {score}")
        self.wait()
        self._writing = self._writer.submit(self._write, update, state, None if score is None else float(score))

    def wait(self) -> None:
        """Wait for the write in flight, if there is one, and raise its error; its state is not needed any more then."""
        if self._writing is not None:
            futures.wait([self._writing])
            ended, self._writing = self._writing, None
            try:
                ended.result()
            finally:
                del ended  # its error would hold itself in a cycle, and the state and the open file with it

    def close(self) -> None:
        """``wait``, and accept no more."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """``(update, state)`` of the newest intact snapshot, or None. A damaged one is reported and passed over.

        Raises:
            SnapshotError: the newest intact snapshot belongs to another recipe, data or model.
            StorageError: one cannot be reached or read now, which says nothing about what is in it.
        """
        self._wait_quietly()
        for update in reversed(self._updates()):
            try:
                return update, self._read(update)
            except _Damaged as damaged:
                self._damaged.add(update)
                log.warning("%s is damaged (%s): falling back to the one before it", self._place(update), damaged)
        return None

    def best(self) -> tuple[int, float] | None:
        """``(update, score)`` of the kept snapshot of this identity with the lowest score, or None without scores.

        It goes by the records; the states are not read.

        Raises:
            StorageError: a record cannot be reached or read now.
        """
        self._wait_quietly()
        return self._best(self._records(self._updates()))

    def _write(self, update: int, state: dict[str, Any], score: float | None) -> None:
        with atomic_folder(self._place(update)) as unfinished:
            torch.save(state, unfinished / STATE)
            record = {"update": update, "score": score, "identity": self.identity}
            write_json(unfinished / RECORD, sealed(record | {"sha256": sha256_file(unfinished / STATE)}))
        self._damaged.discard(update)
        self._prune(update)

    def _prune(self, newest: int) -> None:
        """Remove all but the newest ``keep`` and the best of the snapshots up to ``newest``."""
        updates = self._updates()
        records = self._records(number for number in updates if number <= newest)
        kept = sorted(records)[-self.keep :]
        if best := self._best(records):
            kept.append(best[0])
        for number in set(updates) - set(kept):
            remove(self._place(number))

    def _best(self, records: dict[int, dict[str, Any]]) -> tuple[int, float] | None:
        scores = {
            update: record["score"]
            for update, record in records.items()
            if record["score"] is not None and record["identity"] == self.identity
        }
        if not scores:
            return None
        update = min(scores, key=lambda number: (scores[number], -number))
        return update, scores[update]

    def _records(self, updates: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Update -> record of every snapshot that is not known to be damaged."""
        records = {}
        for update in updates:
            with suppress(_Damaged):
                records[update] = self._record(update)
        return {update: record for update, record in records.items() if update not in self._damaged}

    def _record(self, update: int) -> dict[str, Any]:
        place = join(self._place(update), RECORD)
        with _lost_content(place):
            record = json.loads(read_bytes(place))
        if not isinstance(record, dict) or record != sealed(record) or record["update"] != update:
            raise _Damaged(f"the checksum of {RECORD} does not fit")
        return record

    def _read(self, update: int) -> dict[str, Any]:
        record, place = self._record(update), join(self._place(update), STATE)
        with _lost_content(place), passing_copy(place) as copy:
            if sha256_file(copy) != record["sha256"]:
                raise _Damaged(f"the checksum of {STATE} does not fit")
            self._refuse_another(record["identity"], self._place(update))
            state: dict[str, Any] = torch.load(copy, map_location="cpu", weights_only=True)
        return state

    def _refuse_another(self, identity: dict[str, Any], place: str) -> None:
        for field, theirs, ours in _differences(identity, self.identity):
            raise SnapshotError(
                f"{place}: {field} is {theirs!r} in the snapshot and {ours!r} in this run; use the recipe it was made "
                "with, or remove the folder to start over"
            )

    def _clear_remains(self) -> None:
        clear_unfinished(self.folder)
        for update, names in self._files().items():
            if RECORD not in names:
                log.warning("%s is unfinished, without %s: removing it", self._place(update), RECORD)
                remove(self._place(update))

    def _files(self) -> dict[int, set[str]]:
        found: dict[int, set[str]] = {}
        for name in list_files(self.folder):
            if match := NAME.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(match[2])
        return found

    def _updates(self) -> list[int]:
        return sorted(self._files())

    def _place(self, update: int) -> str:
        return join(self.folder, f"update-{update:06d}")

    def _wait_quietly(self) -> None:
        if self._writing is not None:
            futures.wait([self._writing])


def cpu_copy(state: Any) -> Any:
    """``state``, nested dicts, lists and tuples, with a copy on the CPU in place of every tensor, for ``save``."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: cpu_copy(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(cpu_copy(value) for value in state)
    return state


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the sha256 of its other fields as the field ``seal``, so that a changed field is noticed."""
    fields = {name: value for name, value in record.items() if name != "seal"}
    return fields | {"seal": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}


class _Damaged(Exception):
    """Why a snapshot cannot be read, ever."""


@contextmanager
def _lost_content(place: str) -> Iterator[None]:
    """Errors that say that the content of ``place`` is lost become ``_Damaged``; out of reach for now is not lost."""
    try:
        yield
    except SnapshotError:
        raise
    except (MissingError, FileNotFoundError, ValueError, pickle.UnpicklingError) as error:
        raise _Damaged(str(error)) from None
    except OSError as error:
        if errno.EIO in (error.errno, getattr(error.__cause__, "errno", None)):
            raise _Damaged(str(error)) from None
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{place}: cannot read: {error.strerror or error}") from error


def _differences(theirs: Any, ours: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """``(dotted field, its value in theirs, in ours)`` of every leaf that differs; None where there is none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(name), ours.get(name), f"{field}.{name}" if field else name)
    elif theirs != ours:
        yield field, theirs, ours
