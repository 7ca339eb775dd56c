"""Work on a GPU, recorded once as a CUDA graph and from then on launched as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3
"""Runs before a recording, in which kernels are compiled and tried; CUDA's own examples take as many."""


def warm_up(run: Callable[[], object]) -> None:
    """``run`` as often as a recording of it, or of parts of it, needs; away from the current stream, as CUDA asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def record(run: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """What ``run`` launches, with memory of its own or from ``pool``; it must not wait for the GPU."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which load data and write snapshots, may use the GPU meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
