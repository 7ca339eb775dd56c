"""The progress of a long stage: a bar on a terminal, a line now and then where the output is kept in a log."""

from __future__ import annotations

import os
import shutil
import sys
import time
from types import TracebackType

from tqdm import tqdm

from matvlm.reporting import Reporter

LINE_SECONDS = 5.0
"""Between two lines in a log."""
REPORT_SECONDS = 1.0
"""Between two calls of ``Reporter.progress``, which may redraw a page."""


class Progress:
    """Shows how much of ``total`` is done, with rate, time left and the values last given to ``update``.

    Use it as a context manager; it writes to stderr. Processes of a distributed run other than rank 0 (``RANK``, set by
    torchrun) show nothing. ``initial`` units were done before, by the run that this one continues.
    """

    def __init__(self, total: int, label: str, unit: str, reporter: Reporter | None = None, initial: int = 0):
        self.total, self.label, self.unit = total, label, unit
        self.done = self.initial = initial
        self.reporter = reporter
        self.shown = os.environ.get("RANK", "0") == "0"
        self.postfix = ""
        self.printed: int | None = None
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        self.last_line = self.last_report = self.started
        if self.shown and sys.stderr.isatty():
            # tqdm shows nothing on a terminal that gives its size as 0 x 0, as some containers' do: tell it the size.
            size = shutil.get_terminal_size()
            self.bar = tqdm(
                desc=self.label,
                total=self.total,
                initial=self.initial,
                unit=f" {self.unit}",
                ncols=size.columns,
                nrows=size.lines,
            )
        return self

    def update(self, n: int = 1, **postfix: float | str) -> None:
        """``n`` more units are done; ``postfix`` (``loss=0.31``) is shown from now on."""
        self.done += n
        if postfix:
            self.postfix = ", ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in postfix.items()
            )
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self.postfix, refresh=False)
            self.bar.update(n)
        elif now - self.last_line >= LINE_SECONDS:
            self._print_line(now)
        if now - self.last_report >= REPORT_SECONDS:
            self._report(now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._print_line(time.monotonic())
        self._report(time.monotonic())

    def _print_line(self, now: float) -> None:
        self.last_line = now
        if not self.shown or self.printed == self.done:
            return
        self.printed = self.done
        line = tqdm.format_meter(
            self.done,
            self.total,
            now - self.started,
            ncols=0,
            prefix=self.label,
            unit=f" {self.unit}",
            initial=self.initial,
            postfix=self.postfix or None,
        )
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def _report(self, now: float) -> None:
        self.last_report = now
        if self.reporter is not None:
            self.reporter.progress(self.done, self.total)
