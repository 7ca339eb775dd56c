"""The processes of one run: who this one is among them, and the few numbers that they tell each other.

torchrun starts them, one a GPU, or whatever else sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.
What is exchanged here are counts, losses, answers and, once, what a run goes on from; gradients are the engine's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

LONGEST_WAIT = timedelta(days=7)
"""For the slowest process, or the first one's preparations. A process that has gone is noticed before."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class World:
    """``rank`` of ``size`` processes; alone by default, and then nothing is sent anywhere."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The plain ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def from_first(self, make: Callable[[], Made]) -> Made:
        """The value that ``make`` returns in the first process, after hours maybe; the others wait for it.

        A plain value, or nested dicts, lists and tuples with CPU tensors, which are sent one by one.
        """
        if self.size == 1:
            return make()
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        made = make() if self.is_first else None
        form = [_each_tensor(made, lambda tensor: tensor.to("meta"))]
        dist.broadcast_object_list(form, src=0, group=group)

        def send(tensor: torch.Tensor) -> torch.Tensor:
            value = tensor.contiguous() if self.is_first else torch.empty(tensor.shape, dtype=tensor.dtype)
            dist.broadcast(value, src=0, group=group)
            return value

        value: Made = _each_tensor(made if self.is_first else form[0], send)
        dist.destroy_process_group(group)
        return value

    def leave(self) -> None:
        """The others, after the last exchange with them."""
        if self.size > 1:
            dist.destroy_process_group()


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value``, nested dicts, lists and tuples, with ``change`` made of every tensor, in the same order everywhere."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_tensor(part, change) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each_tensor(part, change) for part in value)
    return value


def join(device: str, timeout: timedelta | None = None) -> tuple[World, str]:
    """Find the other processes that torchrun has started, if it has, and this one's own device.

    Args:
        device: ``cpu``, or ``cuda``, of which each of several processes takes the one with its local rank.
        timeout: how long an exchange may wait for the slowest; None is torch's own.

    Returns:
        The world and the device, such as ``cuda:1``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if device.startswith("cuda") and size > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if size == 1:
        return World(), device
    if not dist.is_initialized():
        # Counts and names are on the CPU in any case.
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size()), device
