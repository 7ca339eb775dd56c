"""How a stage tells the outside what it is doing, without knowing who listens (MLflow, a card, nobody)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


class Reporter:
    """Receives the metrics, files and progress of a running stage. This base class ignores them all."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Scalar ``values`` observed at ``step`` (an optimiser update, or 0 where a stage has no steps)."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A finished local file worth keeping with the run, filed under ``folder``."""

    def table(self, path: Path, folder: str = "") -> None:
        """Such a file that is a table: JSON with ``columns`` and ``data``, a list of rows."""

    def progress(self, done: int, total: int) -> None:
        """``done`` of ``total`` units of work are finished."""

    def published(self, folder: str, updates: int) -> None:
        """The model in ``folder`` is what so many updates of training made; a continued run says it again."""


class Reporters(Reporter):
    """Passes everything on to several reporters."""

    def __init__(self, *reporters: Reporter):
        self.reporters = reporters

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for reporter in self.reporters:
            reporter.metrics(values, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        for reporter in self.reporters:
            reporter.artifact(path, folder)

    def table(self, path: Path, folder: str = "") -> None:
        for reporter in self.reporters:
            reporter.table(path, folder)

    def progress(self, done: int, total: int) -> None:
        for reporter in self.reporters:
            reporter.progress(done, total)

    def published(self, folder: str, updates: int) -> None:
        for reporter in self.reporters:
            reporter.published(folder, updates)
