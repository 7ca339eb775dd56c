"""Answers kept while a task is being evaluated, so that an evaluation that was killed goes on where it stopped.

Each process appends to a file of its own and reads those of all. A file starts with a line that says whose answers
these are; those of another identity are never used. A line per batch follows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matvlm.storage import StorageError, list_names, read_bytes, write_bytes

logger = logging.getLogger(__name__)

PREFIX = "answers-"


def key_of(*request: Any) -> str:
    """What the answer to a request, JSON values, is kept under."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Answers:
    """The answers in ``folder`` that were given under ``identity``, and those that process ``rank`` adds.

    Raises:
        StorageError: ``folder`` cannot be read or written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], rank: int = 0):
        self._path = folder / f"{PREFIX}{rank}.jsonl"
        self._known: dict[str, Any] = {}
        self.seconds = 0.0
        """Spent on answering, over all attempts; of the process that needed most."""
        header, own = json.dumps(dict(identity), sort_keys=True), [""]
        folder.mkdir(parents=True, exist_ok=True)
        for name in list_names(folder, f"{PREFIX}*.jsonl"):
            first, *lines = _whole_lines(folder / name)
            if first != header:
                logger.warning("%s: answers of another evaluation are not used", folder / name)
                continue
            batches = [json.loads(line) for line in lines]
            for batch in batches:
                self._known |= batch["answers"]
            self.seconds = max(self.seconds, sum(batch["seconds"] for batch in batches))
            if name == self._path.name:
                own = lines
        write_bytes(self._path, "\n".join([header, *own]).rstrip("\n").encode() + b"\n")
        self._last = time.monotonic()

    def get(self, key: str) -> Any | None:
        """The answer under ``key``, None if there is none."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep ``answers``, JSON values by key, from now on, whatever happens to this process.

        Raises:
            StorageError: they cannot be written.
        """
        self._known |= answers
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self.seconds += seconds
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"answers": dict(answers), "seconds": seconds}) + "\n")
        except OSError as error:
            raise StorageError(f"{self._path}: cannot write: {error.strerror or error}") from error


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, at least one, without a last one that a killed process has left unfinished."""
    return read_bytes(path).decode(errors="replace").split("\n")[:-1] or [""]
