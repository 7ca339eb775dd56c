"""Wall time and peak memory of a training run: ``python tests/benchmarks/default_run.py [RECIPE]``.

Starts the flow as ``make train`` does and adds up, twice a second, the memory of all its processes: proportional set
size (shared pages counted once) and, beside it, the plain sum of resident sizes. The last line printed is one JSON
object.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
INTERVAL_SECONDS = 0.5


def memory(root: psutil.Process) -> tuple[int, int]:
    """(proportional, resident) bytes of ``root`` and everything below it."""
    proportional = resident = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            usage = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        proportional += getattr(usage, "pss", usage.uss)
        resident += usage.rss
    return proportional, resident


def main(recipe: str) -> None:
    path = ROOT / "flows" / "recipes" / f"{recipe}.yaml"
    flow = [sys.executable, "flows/train_flow.py", "--config", "recipe", str(path), "run", "--max-workers", "2"]
    environment = {
        "METAFLOW_USER": "benchmark",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    started = time.monotonic()
    peaks = (0, 0)
    with subprocess.Popen(flow, cwd=ROOT, env=environment) as run:
        root = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                peaks = tuple(map(max, peaks, memory(root)))
            except psutil.NoSuchProcess:
                break
            time.sleep(INTERVAL_SECONDS)
    result = {
        "recipe": recipe,
        "status": run.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": round(peaks[0] / 1e9, 2),
        "peak_resident_sum_gb": round(peaks[1] / 1e9, 2),
        "cores": psutil.cpu_count(),
        "load_before": round(psutil.getloadavg()[2], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["easyvqa"]))
