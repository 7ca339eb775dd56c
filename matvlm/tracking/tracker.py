"""One flow run in MLflow: a parent run, and a nested run per step that stages report to.

Every value is first appended to a local journal and then sent, a few seconds' worth at a time. Whatever happens to
the tracking server, a stage goes on: it is told nothing, the user is warned once, and the journal keeps what is missing
until a later attempt at the step, ``Tracker.finish`` or ``python -m matvlm sync`` delivers it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from matvlm.gate import Verdict
from matvlm.reporting import Reporter
from matvlm.tracking.address import public_uri, tracking_uri
from matvlm.tracking.delivery import LEAVING_SECONDS, Delivery, report_leftovers
from matvlm.tracking.environment import cut
from matvlm.tracking.journal import (
    FOLDER,
    Journal,
    JournalBusy,
    file_name,
    journal_paths,
    open_journal,
    read_events,
)
from matvlm.tracking.store import CHECKPOINT_TAG, LABEL_TAG, Store, key

logger = logging.getLogger(__name__)

PARENT = "_flow"
FLUSH_SECONDS = 5.0
TABLES_TAG = "mlflow.loggedArtifacts"
"""Where MLflow looks for the tables of a run."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The MLflow side of one flow run; every process of the run makes its own from the same arguments."""

    def __init__(
        self, run_key: str, root: Path, experiment: str, uri: str | None = None, part: str = "", kept: str | None = None
    ):
        """Nothing is opened or imported yet.

        Args:
            run_key: names the flow run for ever; a resumed run uses the key of the run it continues.
            root: the run's local folder; journals go to ``root/tracking``.
            experiment: MLflow experiment, created when missing.
            uri: tracking URI; by default MLFLOW_TRACKING_URI, or the sqlite file ``mlflow.db`` in the current folder.
            part: a folder in ``root/tracking`` for the journals of this process, where others have theirs elsewhere.
            kept: where the run's folder is, if ``root`` is a copy of it.

        Raises:
            ValueError: ``run_key`` holds a quote or a backslash.
        """
        self.run_key = _searchable("run_key", run_key)
        self.root = Path(root)
        self.experiment = experiment
        self.uri = tracking_uri(uri)
        self.folder, self.kept = self.root / FOLDER / file_name(part), kept or str(self.root.absolute())
        self._delivery = Delivery(Store(self.uri, self.root / FOLDER), self.root)

    def parent(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Open the parent run, or open it again, with its parameters and tags."""
        with self._journal(PARENT) as journal:
            journal.append("open", **self._header(None))
            journal.append("params", values={key(name): cut(str(value)) for name, value in params.items()})
            journal.append("tags", values={key(name): str(value) for name, value in tags.items()})
            self._delivery.push(journal, LEAVING_SECONDS)

    def step(self, name: str) -> StepRun:
        """The nested run of step ``name`` (say ``distill[aligned]``), to be used as a context manager."""
        return StepRun(self, _searchable("step", name))

    def summary(self, values: Mapping[str, float]) -> None:
        """The results by which flow runs are compared, as metrics of the parent run; the last value given counts."""
        with self._journal(PARENT) as journal:
            self._head(journal)
            journal.append("metrics", step=0, values=_floats(values))
            self._delivery.push(journal, LEAVING_SECONDS)

    def register(
        self,
        model_name: str,
        checkpoint_uri: str,
        label: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str] | None = None,
    ) -> str | None:
        """Register the checkpoint by reference as the newest version of ``model_name``; ``promote`` gives aliases.

        The weights stay where they are. Registering the same checkpoint of the same run again gives the same version.

        Returns:
            The version, or None when MLflow is away: then it is registered when the journal is delivered.
        """
        all_tags = {key(name): str(value) for name, value in (tags or {}).items()}
        all_tags |= {key(f"metric.{name}"): repr(value) for name, value in _floats(metrics).items()}
        all_tags |= {CHECKPOINT_TAG: checkpoint_uri, LABEL_TAG: label}
        with self._journal(PARENT) as journal:
            self._head(journal)
            journal.append("register", name=model_name, checkpoint_uri=checkpoint_uri, tags=all_tags)
            self._delivery.push(journal, LEAVING_SECONDS)
        return self._delivery.store.versions.get((model_name, checkpoint_uri))

    def promote(
        self, model_name: str, checkpoint_uri: str, verdict: Verdict, version: str | None = None
    ) -> list[str] | None:
        """Tag a version with ``verdict`` and set aliases as ``matvlm.tracking.promotion`` says.

        Args:
            version: its number; None is the version as which this run has registered ``checkpoint_uri``.

        Returns:
            The aliases it has now, or None when MLflow is away: then it is judged when the journal is delivered.
        """
        with self._journal(PARENT) as journal:
            self._head(journal)
            fields = {"name": model_name, "checkpoint_uri": checkpoint_uri, "version": version}
            journal.append("verdict", **fields, verdict=verdict.model_dump(mode="json"))
            self._delivery.push(journal, LEAVING_SECONDS)
        return self._delivery.store.aliases.get((model_name, checkpoint_uri))

    def finish(self, status: Status) -> None:
        """Close the parent run, and as KILLED every step that ended without a word; deliver whatever is left.

        What cannot be delivered is reported with the command that sends it later.
        """
        with self._journal(PARENT) as journal:
            self._head(journal)
            journal.append("status", status=status)
        paths = journal_paths(self.root / FOLDER)
        unfinished = _unfinished_steps(paths)
        left = 0
        for path in paths:
            try:
                with Journal(path) as journal:
                    if path in unfinished:
                        journal.append("status", status="KILLED")
                    self._delivery.push(journal, LEAVING_SECONDS, now=left == 0)
                    left += journal.pending(self._delivery.address)
            except JournalBusy:
                continue
        if left:
            report_leftovers(left, self._delivery.address, self.kept)

    def _journal(self, name: str) -> Journal:
        return open_journal(self.folder, name)

    def _head(self, journal: Journal) -> None:
        """Make sure that ``journal`` starts with its ``open`` event."""
        if next(journal.events(), None) is None:
            journal.append("open", **self._header(None))

    def _header(self, step: str | None) -> dict[str, Any]:
        return {
            "run_key": self.run_key,
            "step": step,
            "experiment": self.experiment,
            "uri": public_uri(self.uri),
        }


class StepRun(Reporter):
    """The nested run of one step: FINISHED or FAILED when its ``with`` block ends, RUNNING again when opened again.

    After a retry or a resume, points already in the journal are left out: one per metric and step, the first. Metrics
    without steps (step 0) may change; then the last value counts.
    """

    def __init__(self, tracker: Tracker, name: str):
        self.name = name
        self._tracker = tracker
        self._journal: Journal | None = None
        self._known: dict[tuple[str, int], float] = {}
        self._tables: list[dict[str, str]] = []
        self._next_flush = 0.0

    def __enter__(self) -> StepRun:
        folder = self._tracker.root / FOLDER
        self._journal = self._tracker._journal(self.name)
        for path in journal_paths(folder, self.name):
            self._known.update(_points(path))
        self._append("open", **self._tracker._header(self.name))
        self.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if self._journal is None:
            return
        failed: Status = "FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED"
        self._journal.append("status", status="FINISHED" if kind is None else failed)
        self._tracker._delivery.push(self._journal, LEAVING_SECONDS)
        self._journal.close()
        self._journal = None

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        new = {name: value for name, value in _floats(values).items() if self._is_news(name, step, value)}
        if new:
            self._known.update({(name, step): value for name, value in new.items()})
            self._append("metrics", step=step, values=new)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a copy of ``path`` and file it under ``folder``; the original may vanish or change afterwards."""
        target = self._tracker.folder / "files" / file_name(self.name) / folder / path.name
        temporary = target.with_name(f".{target.name}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary)
            os.replace(temporary, target)
        except OSError as error:
            logger.warning("%s: not kept with the run: %s", path, error)
            return
        self._append("artifact", file=str(target.relative_to(self._tracker.root / FOLDER)), folder=folder)

    def table(self, path: Path, folder: str = "") -> None:
        """``artifact``, and MLflow shows it as a table and gives it to ``mlflow.load_table``."""
        self.artifact(path, folder)
        self._tables.append({"path": f"{folder}/{path.name}".lstrip("/"), "type": "table"})
        self._append("tags", values={TABLES_TAG: json.dumps(self._tables)})

    def params(self, values: Mapping[str, str]) -> None:
        """Parameters of this step; a value that differs from the one of an earlier attempt becomes a tag."""
        self._append("params", values={key(name): cut(str(value)) for name, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of this step's run; the last value given counts."""
        self._append("tags", values={key(name): str(value) for name, value in values.items()})

    def flush(self) -> None:
        """Send what has been journalled; does nothing while waiting for a server that was away."""
        if self._journal is not None:
            self._tracker._delivery.push(self._journal)
            self._next_flush = time.monotonic() + FLUSH_SECONDS

    def _append(self, kind: str, **fields: Any) -> None:
        if self._journal is None:
            raise RuntimeError(f"the run of step {self.name!r} is not open: use it as a context manager")
        self._journal.append(kind, **fields)
        if time.monotonic() >= self._next_flush:
            self.flush()

    def _is_news(self, name: str, step: int, value: float) -> bool:
        known = self._known.get((name, step))
        return known is None or (step == 0 and repr(known) != repr(value))


def _points(path: Path) -> Iterator[tuple[tuple[str, int], float]]:
    for event, _ in read_events(path):
        if event["kind"] == "metrics":
            for name, value in event["values"].items():
                yield (name, event["step"]), value


def _unfinished_steps(paths: list[Path]) -> set[Path]:
    """Of each step whose latest attempt was opened and not closed, the journal of that attempt."""
    latest: dict[str, tuple[int, str, Path]] = {}
    for path in paths:
        step = None
        for event, _ in read_events(path):
            step = event.get("step") if event["kind"] == "open" else step
            if step is not None and event["kind"] in ("open", "status"):
                latest[step] = max(latest.get(step, (0, "", path)), (event["time"], event["kind"], path))
    return {path for _, kind, path in latest.values() if kind == "open"}


def _floats(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers under names MLflow takes; anything else is left out with a warning."""
    numbers = {}
    for name, value in values.items():
        try:
            numbers[key(name)] = float(value)
        except (TypeError, ValueError):
            logger.warning("metric %s is not a number: %r", name, value)
    return numbers


def _searchable(what: str, text: str) -> str:
    if not text or any(character in text for character in "'\"\\`"):
        raise ValueError(f"{what} must not be empty nor hold quotes or backslashes, got {text!r}")
    return text
