"""A log gets whole lines at intervals, a terminal one moving bar, the reporter the counts."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys

import pytest

from matvlm import progress
from matvlm.progress import Progress
from matvlm.reporting import Reporter


class Clock:
    """Stands in for ``time.monotonic`` so that no test waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Counts(Reporter):
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def progress(self, done: int, total: int) -> None:
        self.seen.append((done, total))


def test_a_log_gets_a_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, counts = Clock(monkeypatch), Counts()
    with Progress(20, "distil", "update", counts, initial=4) as bar:
        for update in range(5, 21):
            clock.now += 0.75
            bar.update(1, loss=1 / update, skipped=3)
    out, err = capsys.readouterr()
    assert not out
    assert "\r" not in err
    assert err.splitlines() == [
        "distil:  55% 11/20 [00:05<00:06,  1.33 update/s, loss=0.09091, skipped=3]",
        "distil:  90% 18/20 [00:10<00:01,  1.33 update/s, loss=0.05556, skipped=3]",
        "distil: 100% 20/20 [00:12<00:00,  1.33 update/s, loss=0.05, skipped=3]",
    ]
    assert counts.seen == [(done, 20) for done in (6, 8, 10, 12, 14, 16, 18, 20, 20)]


def test_an_interrupted_stage_says_how_far_it_got(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counts()

    def fail() -> None:
        with Progress(10, "targets", "sample", counts) as bar:
            bar.update(3)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr().err.startswith("targets:  30% 3/10 [")
    assert counts.seen == [(3, 10)]


def test_only_rank_zero_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with Progress(2, "distil", "update") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_one_moving_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress(4, "distil", "update") as bar:
            bar.update(1, loss=0.5)
            bar.update(3, loss=0.25)
        stderr.flush()
        shown = ""
        while select.select([controller], [], [], 0.5)[0]:  # it may arrive in pieces
            shown += os.read(controller, 65536).decode()
    os.close(controller)
    assert shown.count("\n") == 1
    last = [text for text in shown.split("\r") if text.strip()][-1]
    assert re.search(r"^distil: 100%\|.*\| 4/4 \[.*update/s, loss=0.25\]", last), shown


def test_nothing_to_do_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(0, "targets", "sample"):
        pass
