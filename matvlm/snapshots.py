"""Training state on disk: written atomically, checked by its sha256 when read, bound to the recipe that made it.

A snapshot is a folder ``update-000100`` with ``state.pt`` (tensors and plain values, read back with ``weights_only``)
and ``snapshot.json`` (checksum and identity). It appears when both are complete.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from matvlm.storage import StorageError, atomic_folder, read_json, remove, sha256_file, write_json

log = logging.getLogger(__name__)

NAME = re.compile(r"update-(\d+)")
STATE, RECORD = "state.pt", "snapshot.json"


class SnapshotError(ValueError):
    """A snapshot that must not be continued from; the message names the folder and the field that differs."""


class Snapshots:
    """The snapshots of one training run in ``folder``; the newest ``keep`` are kept.

    ``identity`` names everything that a continued run must share with the one that wrote the snapshot, as plain values.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2):
        self.folder, self.keep = folder, keep
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: lists for tuples

    def save(self, update: int, state: dict[str, Any]) -> None:
        """Write ``state`` as the snapshot after ``update`` optimiser updates and drop what it makes superfluous.

        Later snapshots, of a run that went on from an earlier one than this continues, go as well as the oldest.

        Raises:
            StorageError: the disk is full or not writable; nothing half-written is left under a snapshot's name.
        """
        with atomic_folder(self._place(update)) as unfinished:
            torch.save(state, unfinished / STATE)
            record = {"sha256": sha256_file(unfinished / STATE), "update": update, "identity": self.identity}
            write_json(unfinished / RECORD, record)
        updates = self._updates()
        kept = [number for number in updates if number <= update][-self.keep :]
        for number in set(updates) - set(kept):
            remove(self._place(number))

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """``(update, state)`` of the newest intact snapshot, or None. A damaged one is reported and passed over.

        Raises:
            SnapshotError: the newest intact snapshot belongs to another recipe, data or model.
        """
        for update in reversed(self._updates()):
            try:
                return update, self._read(self._place(update))
            except _Damaged as damaged:
                log.warning("%s is damaged (%s): falling back to the one before it", self._place(update), damaged)
        return None

    def _read(self, place: Path) -> dict[str, Any]:
        try:
            record = read_json(place / RECORD)
            if sha256_file(place / STATE) != record["sha256"]:
                raise _Damaged(f"the checksum of {STATE} does not fit")
            found = dict(record["identity"])
        except (StorageError, OSError, KeyError, TypeError, ValueError) as error:
            raise _Damaged(str(error)) from None
        for field, theirs, ours in _differences(found, self.identity):
            raise SnapshotError(
                f"{place}: {field} is {theirs!r} in the snapshot and {ours!r} in this run; use the recipe it was made "
                "with, or remove the folder to start over"
            )
        try:
            state: dict[str, Any] = torch.load(place / STATE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise _Damaged(f"{STATE} does not hold tensors and plain values: {error}") from None
        return state

    def _updates(self) -> list[int]:
        matches = (NAME.fullmatch(path.name) for path in self.folder.glob("update-*"))
        return sorted(int(match.group(1)) for match in matches if match)

    def _place(self, update: int) -> Path:
        return self.folder / f"update-{update:06d}"


class _Damaged(Exception):
    """Why a snapshot cannot be read."""


def _differences(theirs: Any, ours: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    """``(dotted field, its value in theirs, in ours)`` of every leaf that differs; None where there is none."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(name), ours.get(name), f"{field}.{name}" if field else name)
    elif theirs != ours:
        yield field, theirs, ours
