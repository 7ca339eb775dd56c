"""From the journals to MLflow, without ever holding up a run for long; and all at once, later, by ``sync``."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from matvlm.storage import exists, join, local_copy
from matvlm.tracking.address import public_uri, tracking_uri
from matvlm.tracking.journal import FOLDER, Event, Journal, JournalBusy, journal_paths
from matvlm.tracking.store import (
    METRICS_PER_CALL,
    Store,
    TrackingError,
    UnusableEvent,
    patience,
)

logger = logging.getLogger(__name__)

# How long one request may hold up a stage; the end of one; and a command that has nothing else to do.
RUNNING_SECONDS, LEAVING_SECONDS, SYNC_SECONDS = 2, 5, 60
LONGEST_PAUSE_SECONDS = 60.0


class Delivery:
    """Sends journals to one store; after a failure it waits, longer each time, before it tries again."""

    def __init__(self, store: Store, root: Path):
        self.store = store
        self.address = public_uri(store.uri)
        self._root = root
        self._away = root / FOLDER / "away"
        self._failures = 0
        self._next_attempt = 0.0

    def push(self, journal: Journal, seconds: int = RUNNING_SECONDS, now: bool = False) -> None:
        """Deliver what ``journal`` holds if it is time to try. Never raises; one process of the run warns of an outage.

        ``seconds`` bounds each request. With ``now`` a pause after a failure is cut short.
        """
        journal.persist()
        if not now and time.monotonic() < self._next_attempt:
            return
        try:
            with patience(seconds):
                deliver(journal, self.store, self.address)
        except Exception as error:
            self._failures += 1
            self._next_attempt = time.monotonic() + min(2.0**self._failures, LONGEST_PAUSE_SECONDS)
            if self._failures == 1 and self._first_to_notice():
                logger.warning(
                    "MLflow at %s cannot be used (%s). The run goes on; what it tracks is kept in %s.",
                    self.address,
                    _first_line(error),
                    self._root / FOLDER,
                )
        else:
            self._failures = 0
            if self._away.exists():
                self._away.unlink(missing_ok=True)
                logger.warning("MLflow at %s is back and gets what was kept meanwhile.", self.address)

    def _first_to_notice(self) -> bool:
        """Whether no other process of the run has warned of this outage; the file ``away`` says that one has."""
        try:
            self._away.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            pass  # the disk has its own troubles; better to warn twice
        return True


def deliver(journal: Journal, store: Store, address: str) -> int:
    """Send every event of ``journal`` that ``address`` lacks; returns how many. Stops at the first failure."""
    header = next((event for event, _ in journal.events()), None)
    if header is None:
        return 0
    sent = 0
    for events, end in _batches(journal.events(journal.cursor(address))):
        sent += _send(header, events, store)
        journal.advance(address, end)
    return sent


def sync(root: str | Path, uri: str | None = None) -> int:
    """Send everything under ``root`` that MLflow lacks; returns the number of events sent.

    Args:
        root: the run's folder, local or on S3, the one that holds ``tracking/``.
        uri: where to; by default MLFLOW_TRACKING_URI, else the URI that the run itself used.

    Raises:
        TrackingError: no journals there, or MLflow cannot be reached; what was sent before stays sent.
    """
    place = join(root, FOLDER)
    folder = local_copy(place) if exists(place) else Path(place)
    paths = journal_paths(folder)
    if not paths:
        raise TrackingError(f"{place}: no journals (*.jsonl); give the folder of a run, the one that holds {FOLDER}/")
    sent, stores = 0, dict[str, Store]()
    for path in paths:
        try:
            with Journal(path) as journal, patience(SYNC_SECONDS):
                first = next(journal.events(), None)
                if first is None:
                    continue
                target = tracking_uri(uri or os.environ.get("MLFLOW_TRACKING_URI") or first[0]["uri"])
                store = stores.setdefault(target, Store(target, folder))
                sent += deliver(journal, store, public_uri(target))
        except JournalBusy:
            logger.warning("%s: left out, its step is still running", path)
        except Exception as error:
            raise TrackingError(f"{path}: cannot be sent: {_first_line(error)}") from error
    return sent


def report_leftovers(events: int, address: str, root: str) -> None:
    """Tell the user what MLflow at ``address`` lacks of the run in ``root``, and how to send it."""
    command = f"python -m matvlm sync {shlex.quote(root)}"
    logger.warning(
        "%d tracked events have not reached MLflow at %s. Send them later with:\n  %s", events, address, command
    )


def _send(header: Event, events: list[Event], store: Store) -> int:
    """Send a batch; if MLflow refuses it, send its events one by one and leave out those that it refuses again."""
    try:
        store.send(header, events)
        return len(events)
    except UnusableEvent as error:
        if len(events) > 1:
            return sum(_send(header, [event], store) for event in events)
        logger.warning("MLflow refuses a %s event; it stays in the journal: %s", events[0]["kind"], _first_line(error))
        return 0


def _batches(events: Iterator[tuple[Event, int]]) -> Iterator[tuple[list[Event], int]]:
    """Runs of metrics events of at most METRICS_PER_CALL values, and every other event by itself."""
    batch: list[Event] = []
    values = batch_end = 0
    for event, end in events:
        is_metrics = event["kind"] == "metrics"
        if batch and (not is_metrics or values + len(event["values"]) > METRICS_PER_CALL):
            yield batch, batch_end
            batch, values = [], 0
        if is_metrics:
            batch, values, batch_end = [*batch, event], values + len(event["values"]), end
        else:
            yield [event], end
    if batch:
        yield batch, batch_end


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0][:300]
