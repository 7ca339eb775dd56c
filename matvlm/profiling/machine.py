"""What the figures were measured on and with."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers

from matvlm import kernels
from matvlm.profiling.stacks import now

COPY_BYTES = 256 << 20
"""Far more than any cache holds."""
ROUNDS, COPIES = 3, 5


def machine_facts(device: torch.device) -> dict[str, str]:
    """Processor, threads, versions."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": kernels.resolve_backend("auto", device),
        "input": "random token ids, greedy decoding, no end token",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def copy_bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes a second, read and written, by copies of ``size`` bytes on ``device``: in the best of several rounds."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(ROUNDS):
        started = now(device)
        for _ in range(COPIES):  # a host waits for the last one only
            target.copy_(source)
        seconds.append(now(device) - started)
    return 2 * size * COPIES / min(seconds)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
