"""Training state on disk: written atomically, checked by its sha256 when read, bound to the recipe that made it.

A snapshot is a pair ``update-000100.pt`` (tensors and plain values, read back with ``weights_only``) and
``update-000100.json`` (checksum and identity). The JSON is written last, so a pair without it was never finished.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch

from matvlm.storage import atomic_path, read_json, sha256_file, write_json

log = logging.getLogger(__name__)

NAME = re.compile(r"update-(\d+)\.json")


class SnapshotError(ValueError):
    """A snapshot that must not be continued from; the message names the folder and the field that differs."""


class Snapshots:
    """The snapshots of one training run in ``folder``; the newest ``keep`` are kept.

    ``identity`` names everything that a continued run must share with the one that wrote the snapshot.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], keep: int = 2):
        self.folder, self.identity, self.keep = folder, identity, keep

    def save(self, update: int, state: dict[str, Any]) -> None:
        """Write ``state`` as the snapshot after ``update`` optimiser updates and drop the oldest.

        Raises:
            StorageError: the disk is full or not writable; nothing half-written is left under a snapshot's name.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._state_path(update)
        with atomic_path(path) as unfinished:
            torch.save(state, unfinished)
        record = {"sha256": sha256_file(path), "update": update, "identity": self.identity}
        write_json(str(path.with_suffix(".json")), record)
        for old in self._updates()[: -self.keep]:
            self._state_path(old).with_suffix(".json").unlink(missing_ok=True)
            self._state_path(old).unlink(missing_ok=True)

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """``(update, state)`` of the newest intact snapshot, or None. A damaged one is reported and passed over.

        Raises:
            SnapshotError: the newest intact snapshot belongs to another recipe, data or model.
        """
        for update in reversed(self._updates()):
            path = self._state_path(update)
            record = read_json(str(path.with_suffix(".json")))
            if not path.exists() or sha256_file(path) != record["sha256"]:
                log.warning("%s is damaged: falling back to the snapshot before it", path)
                continue
            self._check_identity(path, record["identity"])
            return update, torch.load(path, map_location="cpu", weights_only=True)
        return None

    def _check_identity(self, path: Path, found: dict[str, Any]) -> None:
        for field in sorted(self.identity.keys() | found.keys()):
            if self.identity.get(field) != found.get(field):
                raise SnapshotError(
                    f"{path}: {field} is {found.get(field)!r} in the snapshot and {self.identity.get(field)!r} in this "
                    "run; use the recipe it was made with, or remove the folder to start over"
                )

    def _updates(self) -> list[int]:
        matches = (NAME.fullmatch(path.name) for path in self.folder.glob("update-*.json"))
        return sorted(int(match.group(1)) for match in matches if match)

    def _state_path(self, update: int) -> Path:
        return self.folder / f"update-{update:06d}.pt"
