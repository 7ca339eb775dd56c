"""What the time of a loop goes into, by phase, on a GPU as on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


class Phases:
    """The time of each phase since the last ``spent``."""

    def __init__(self, device: str):
        self.device, self.on_gpu = device, device.startswith("cuda")
        self._restart()

    def mark(self, phase: str) -> None:
        """What was done since the mark before was ``phase``. On a GPU that is what it did, or waited for."""
        self.marks.append((phase, self._now()))

    def spent(self) -> dict[str, float]:
        """Seconds of each phase, which begin anew."""
        spent: dict[str, float] = {}
        if self.marks and self.on_gpu:
            self.marks[-1][1].synchronize()
        before = self.first
        for phase, now in self.marks:
            seconds = before.elapsed_time(now) / 1e3 if self.on_gpu else now - before
            spent[phase] = spent.get(phase, 0.0) + seconds
            before = now
        self._restart()
        return spent

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _restart(self) -> None:
        self.marks: list[tuple[str, Any]] = []
        self.first = self._now()
