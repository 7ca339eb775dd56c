"""Time and memory of one SSD scan on a GPU, by backend, chunk size and ``scale_input``.

    python tests/benchmarks/kernels_gpu.py --chunks 64 256 --tokens 900 --batch 1 4 8

The shape is that of a Phi-2 layer (32 heads of 80 x 80, bfloat16, random values). Medians of 20 runs after 5 for
warming up, each between two events on the stream; memory is the peak above what the inputs take.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matvlm.kernels.ssd import ssd_scan

HEADS, WIDTH = 32, 80
WARM_UP, REPEATS = 5, 20


def make_inputs(batch: int, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    inputs = {name: torch.randn(batch, tokens, HEADS, WIDTH, device="cuda", dtype=torch.bfloat16) for name in "xBC"}
    inputs["dt"] = torch.rand(batch, tokens, HEADS, device="cuda") * 0.1 + 0.004
    inputs["A"] = -torch.ones(HEADS, device="cuda")
    return {name: value.requires_grad_() for name, value in inputs.items()}


def milliseconds(function: Callable[[], None]) -> float:
    times = []
    for repeat in range(WARM_UP + REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if repeat >= WARM_UP:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(batch: int, tokens: int, chunk_size: int, scale_input: bool, backend: str) -> str:
    arguments: dict[str, Any] = {"chunk_size": chunk_size, "scale_input": scale_input, "backend": backend}
    arguments |= make_inputs(batch, tokens)

    def forward() -> None:
        with torch.no_grad():
            ssd_scan(**arguments)

    def forward_and_backward() -> None:
        y, _ = ssd_scan(**arguments)
        y.backward(y.detach())

    forward_ms = milliseconds(forward)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both_ms = milliseconds(forward_and_backward)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    row = f"{backend:<10}{batch:>6}{tokens:>8}{chunk_size:>7}{scale_input!s:>7}"
    return f"{row}{forward_ms:>12.2f}{both_ms:>12.2f}{peak:>12.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, nargs="+", default=[900])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--backends", nargs="+", default=["mamba_ssm", "torch"])
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {HEADS} heads of {WIDTH} x {WIDTH}, bfloat16")
    print("backend    batch  tokens  chunk  scale  forward ms  + backward   extra MiB")
    for backend in arguments.backends:
        for chunk_size in arguments.chunks:
            for scale_input in (True, False):
                for tokens in arguments.tokens:
                    for batch in arguments.batch:
                        print(measure(batch, tokens, chunk_size, scale_input, backend), flush=True)


if __name__ == "__main__":
    main()
