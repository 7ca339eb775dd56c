"""Who evaluates a checkpoint, agreed on through its marks, among watchers that may share nothing else.

Each watcher has a place of its own and a mark of its own on a checkpoint. It sets the mark first and then looks for
others': of several that do so at the same moment at least one sees another one, and steps back. So never do two of them
hold a claim, whatever the order in which their writes arrive. What is evaluated gets a mark that all share, and stays.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from datetime import UTC, datetime, timedelta

from matvlm.watch.sources import Source

log = logging.getLogger(__name__)

DONE, FAILED = "done", "failed"
LOST_AFTER = timedelta(hours=24)
"""A claim of another place that is older than this counts for nothing: its watcher is gone, and its folder too."""
STEP_BACK_SECONDS = 0.5


class Claims:
    """The claims of one watcher on the checkpoints of ``source``, for evaluation by the recipe named ``recipe``.

    Args:
        place: names the watcher for ever, and no other one.
    """

    def __init__(self, source: Source, recipe: str, place: str):
        self.source = source
        self._outcome = f"watch.{recipe}"
        self._claim = f"{self._outcome}.{place}"

    def new(self) -> list[str]:
        """The checkpoints that nobody has evaluated to an end yet, the oldest first; some may be another's."""
        return [checkpoint for checkpoint, keys in self.source.found().items() if self._outcome not in keys]

    def take(self, checkpoint: str) -> bool:
        """Claim ``checkpoint``, or claim it again; False if another watcher has it or is through with it."""
        while not self._is_taken(checkpoint):
            self.source.mark(checkpoint, self._claim, _now())
            if not self._is_taken(checkpoint):
                return True
            self.source.unmark(checkpoint, self._claim)
            time.sleep(random.uniform(0, STEP_BACK_SECONDS))
        return False

    def finish(self, checkpoint: str, outcome: str) -> None:
        """Keep for ever what became of it, ``DONE`` or ``FAILED`` and more words, and let go of it.

        A claim that is still there after that, because the watcher was killed in between, means nothing any more.
        """
        self.source.mark(checkpoint, self._outcome, f"{outcome}, {_now()}")
        self.source.unmark(checkpoint, self._claim)

    def forget_failures(self) -> list[str]:
        """Make those that failed new again, and return them."""
        found = [checkpoint for checkpoint, keys in self.source.found().items() if self._outcome in keys]
        failed = [one for one in found if self.source.marks(one).get(self._outcome, "").startswith(FAILED)]
        for checkpoint in failed:
            self.source.unmark(checkpoint, self._outcome)
        return failed

    def _is_taken(self, checkpoint: str) -> bool:
        marks = self.source.marks(checkpoint)
        others = [key for key in marks if key.startswith(f"{self._outcome}.") and key != self._claim]
        living = [key for key in others if not _is_lost(marks[key])]
        for key in set(others) - set(living):
            log.warning("%s: the claim %s of %s is too old to be alive and is removed", checkpoint, key, marks[key])
            self.source.unmark(checkpoint, key)
        return bool(living) or self._outcome in marks


def _now() -> str:
    return f"{datetime.now(UTC).isoformat(timespec='seconds')} on {socket.gethostname()}"


def _is_lost(claim: str) -> bool:
    try:
        return datetime.now(UTC) - datetime.fromisoformat(claim.partition(" ")[0]) > LOST_AFTER
    except (ValueError, TypeError):
        return False
