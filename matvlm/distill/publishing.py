"""The student as a model folder of its own, while it is still being trained, for whoever evaluates what is new."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from matvlm.artifacts import Checkpoint
from matvlm.distill.run import Run
from matvlm.models import hybrid
from matvlm.reporting import Reporter
from matvlm.storage import MissingError, list_names, read_json, write_json

FOLDER = "published"
RECORD = re.compile(r"update-(\d+)\.json")


class Publisher:
    """Saves the student of ``run`` while it is trained; the first process of the run writes and reports.

    A published model is ``folder/published/update-000100``. The record beside it, of the same name with ``.json``,
    comes when it is complete and says of which run it is.

    Args:
        processor: saved beside the model.
        teacher: named as the model's origin.
        folder: the run's own.
        identity: all that decides what the run makes, see ``Snapshots``.
    """

    def __init__(
        self,
        run: Run,
        processor: Any,
        teacher: Checkpoint,
        folder: Path,
        identity: dict[str, Any],
        reporter: Reporter,
    ):
        self.run, self.processor, self.teacher = run, processor, teacher
        self.folder, self.identity, self.reporter = folder, identity, reporter

    def repeat(self, done: int) -> None:
        """Report again what was published in the first ``done`` updates: the report may have been lost."""
        if not self.run.world.is_first or not (self.folder / FOLDER).exists():
            return
        found = [RECORD.fullmatch(name) for name in list_names(self.folder / FOLDER)]
        for update in sorted(int(match[1]) for match in found if match):
            if update <= done and self._is_published(update):
                self.reporter.published(str(self._place(update)), update)

    def publish(self, update: int, total: int) -> None:
        """After ``update``, if it is the time; the last one of the ``total`` is for the run itself to save.

        Raises:
            StorageError: the model cannot be written.
        """
        every = self.run.recipe.distill.publish_every_updates
        if not every or update % every or update == total:
            return
        place, record = self._place(update), self._record(update)
        with self.run.engine.whole():
            if self.run.world.is_first and not self._is_published(update):
                self._write(update, place)
                write_json(record, self.identity)
        if self.run.world.is_first:
            self.reporter.published(str(place), update)

    def save(self, update: int, place: Path) -> None:
        """Write the student after ``update`` to ``place``; all processes have to call it."""
        with self.run.engine.whole():
            if self.run.world.is_first:
                self._write(update, place)

    def _write(self, update: int, place: Path) -> None:
        recipe = self.run.recipe.model_dump(mode="json")
        provenance = {"teacher": self.teacher.uri, "recipe": recipe, "updates": update}
        hybrid.save(self.run.student, self.processor, place, provenance)

    def _is_published(self, update: int) -> bool:
        with suppress(MissingError):
            return bool(read_json(self._record(update)) == self.identity)
        return False

    def _place(self, update: int) -> Path:
        return self.folder / FOLDER / f"update-{update:06d}"

    def _record(self, update: int) -> Path:
        return self._place(update).with_suffix(".json")
