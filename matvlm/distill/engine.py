"""Two engines behind one interface: plain torch, and DeepSpeed where it is installed and there is a GPU.

An engine owns the optimiser and sums gradients over the processes. ``backward`` adds gradients, ``step`` clips, updates
and clears them. Its ``state`` is the fp32 master weights and Adam moments of the trained parameters by name, the same
for both engines and any number of processes, so a run may be continued by others.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matvlm.config import Distill
from matvlm.optimizer import adamw
from matvlm.snapshots import cpu_copy
from matvlm.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    name: str

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of ``loss``, one micro-batch's share of the update's loss; ``last`` closes the update."""

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; returns their total norm before clipping.

        Gradients whose norm is not finite are cleared and nothing else changes, the moments and step count included.
        """

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Per trained parameter, on the CPU: ``value`` (fp32), ``exp_avg``, ``exp_avg_sq`` and ``step``.

        All processes have to call it.
        """

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None: ...

    def whole(self) -> AbstractContextManager[None]:
        """Inside, every process has all weights, to read; all processes have to enter and leave."""


def make_engine(
    parameters: dict[str, nn.Parameter],
    settings: Distill,
    device: str,
    world: World | None = None,
    modules: Sequence[nn.Module] = (),
) -> Engine:
    """The engine that ``settings.engine`` names; ``auto`` is DeepSpeed on a GPU where it is installed, else torch.

    Args:
        parameters: what is trained, float32, by name.
        world: the processes whose gradients are summed; None means this one alone.
        modules: what ZeRO-3 shares among the processes, none of them inside of another; all of ``parameters`` are in
            there. No other engine looks at them.

    Raises:
        ValueError: DeepSpeed is asked for and not installed, or ZeRO-3 together with ``compile``.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    if settings.engine == "deepspeed" and not installed:
        raise ValueError("distill.engine is 'deepspeed', which is not installed: pip install deepspeed, or use 'torch'")
    if settings.engine == "deepspeed" or (settings.engine == "auto" and installed and device != "cpu"):
        from matvlm.distill.deepspeed import deepspeed_engine

        return deepspeed_engine(parameters, settings, device, world or World(), modules)
    return TorchEngine(parameters, settings, world or World())


def set_rate(optimizer: Any, lr: float) -> None:
    """``lr`` is the learning rate of all groups from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class TorchEngine:
    name = "torch"

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill, world: World):
        self.parameters, self.settings, self.world = parameters, settings, world
        on_gpu = all(parameter.is_cuda for parameter in parameters.values())
        self.optimizer = adamw(parameters.values(), settings.optimizer, fused=on_gpu or None)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        set_rate(self.optimizer, lr)
        if self.world.size > 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.optimizer.clip_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: cpu_copy({"value": parameter.detach(), **self._moments(parameter)})
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, parameter in self.parameters.items():
            saved = dict(state[name])
            parameter.copy_(saved.pop("value"))
            self.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in saved.items()
            }

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's own, or those that it would start with for a parameter that had no gradient yet."""
        fresh = {key: torch.zeros_like(parameter) for key in MOMENTS} | {"step": torch.tensor(0.0)}
        return {**fresh, **self.optimizer.state[parameter]}
