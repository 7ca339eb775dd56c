"""The processes that torchrun has started for an evaluation: they share the questions, each with the whole model."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from matvlm.evaluate.results import EvaluationError

LONGEST_WAIT = timedelta(days=7)
"""For the slowest process. One that has gone is noticed before."""
Value = TypeVar("Value")


class Ranks(NamedTuple):
    """Process ``rank`` of ``size``; alone by default, and then nothing is sent anywhere."""

    rank: int = 0
    size: int = 1

    def all(self, value: Value) -> list[Value]:
        """The plain ``value`` of every process, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def gather(self, value: Value, to: int = 0) -> list[Value] | None:
        """``all`` in process ``to`` only, which spares the others the memory; None there."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == to else None
        dist.gather_object(value, values, dst=to)
        return values

    def share(self, value: Any) -> Any:
        """The plain ``value`` of the first process, in all."""
        shared = [value]
        if self.size > 1:
            dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def together(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns in this process.

        Raises:
            Exception: its own error, or that of another process, in every one of them.
        """
        made, error = None, None
        try:
            made = make()
        except Exception as raised:
            error = raised
        errors = [each for each in self.all(None if error is None else str(error)) if each is not None]
        if error is not None:
            raise error
        if errors:
            raise EvaluationError(errors[0])
        return cast(Value, made)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> tuple[Ranks, str]:
    """Find the other processes that torchrun has started, if it has, and this one's own device.

    Args:
        device: ``cpu``, or ``cuda``, of which each of several processes takes the one with its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(), device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)  # only counts and answers are exchanged
    return Ranks(dist.get_rank(), dist.get_world_size()), device
