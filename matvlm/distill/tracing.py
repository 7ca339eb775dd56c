"""A trace of some updates by torch's profiler, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from matvlm.reporting import Reporter

TRACE = "trace.json.gz"


@contextmanager
def tracing(updates: int, folder: Path, device: str, reporter: Reporter) -> Iterator[Callable[[], None]]:
    """Yields what to call after each update. The first two are left out; ``updates`` after them are traced.

    The trace is ``folder/trace.json.gz``, and an artifact of the run. With 0 updates nothing happens.
    """
    if not updates:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.startswith("cuda") else [])]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRACE
    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=updates, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
    if path.exists():
        reporter.artifact(path, "profile")
