"""How fast a run is, what its time goes into, and what share of a GPU's arithmetic it uses.

That share is MFU as arXiv 2204.02311 has it, as long as nothing is computed anew (``activation_checkpointing``): that
is counted too, and then it is the hardware's utilisation, HFU there.
"""

from __future__ import annotations

import time

import torch

from matvlm.distill.failures import memory_in_use
from matvlm.phases import Phases

PHASES = ("data", "teacher", "student", "backward", "optimizer")
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Part of a GPU's name -> bfloat16 FLOP/s of dense matrix products, from the makers' data sheets; first match holds."""


def peak_of(device: str) -> float | None:
    """FLOP/s that ``device`` could do at most in bfloat16; None where that is not known."""
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class Speed:
    """Samples, tokens and the time of each phase since the rates were last asked for."""

    def __init__(self, device: str, processes: int = 1):
        """``processes`` share the work that is added."""
        self.device, self.processes = device, processes
        self.phases = Phases(device)
        self.peak = peak_of(device)
        self.flops_per_token = 0.0
        """Set by whoever has counted them; only then are they reported."""
        self.restart()

    def mark(self, phase: str) -> None:
        """What was done since the mark before was ``phase``. On a GPU that is what it did, or waited for."""
        self.phases.mark(phase)

    def add(self, samples: int, tokens: int) -> None:
        self.samples += samples
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Rates since the last call, the share of each phase in that time, and the memory in use, in GB.

        Samples and tokens are those of all processes; shares, ``tflops_per_second`` and ``mfu`` are those of one. The
        memory is a GPU's peak of allocated tensors, or the process's resident memory.
        """
        spent = dict.fromkeys(PHASES, 0.0) | self.phases.spent()
        seconds = time.monotonic() - self.started
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "memory_gb": memory_in_use(self.device) / 1e9,
        }
        if self.flops_per_token and self.peak:
            flops = self.flops_per_token * self.tokens / self.processes / seconds
            rates |= {"tflops_per_second": flops / 1e12, "mfu": flops / self.peak}
        whole = sum(spent.values())
        rates |= {f"share_{phase}": value / whole for phase, value in spent.items() if whole}
        self.restart()
        return rates

    def restart(self) -> None:
        """Forget what was measured so far."""
        self.phases.spent()
        self.samples = self.tokens = 0
        self.started = time.monotonic()
