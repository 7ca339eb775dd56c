"""Two engines behind one interface: plain torch, and DeepSpeed where it is installed and there is a GPU.

An engine owns the optimiser and sums gradients over the processes. ``backward`` adds gradients, ``step`` clips, updates
and clears them. Its ``state`` is the fp32 master weights and Adam moments of the trained parameters by name, the same
for both engines and any number of processes, so a run may be continued by others.
"""

from __future__ import annotations

import importlib.util
import math
import os
import socket
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from matvlm.config import Distill
from matvlm.distill.world import World
from matvlm.optimizer import adamw
from matvlm.snapshots import cpu_copy

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


def make_engine(
    parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World | None = None
) -> Engine:
    """The engine that ``settings.engine`` names; ``auto`` is DeepSpeed on a GPU where it is installed, else torch.

    Args:
        parameters: what is trained, float32, by name; the engine sees no other part of the model.
        world: the processes whose gradients are summed; None means this one alone.

    Raises:
        ValueError: DeepSpeed is asked for and not installed.
    """
    installed = importlib.util.find_spec("deepspeed") is not None
    if settings.engine == "deepspeed" and not installed:
        raise ValueError("distill.engine is 'deepspeed', which is not installed: pip install deepspeed, or use 'torch'")
    if settings.engine == "deepspeed" or (settings.engine == "auto" and installed and device != "cpu"):
        return DeepSpeedEngine(parameters, settings, device, world or World())
    return TorchEngine(parameters, settings, world or World())


class TorchEngine:
    name = "torch"

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill, world: World):
        self.parameters, self.settings, self.world = parameters, settings, world
        self.optimizer = adamw(parameters.values(), settings.optimizer)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's own, or those that it would start with for a parameter that had no gradient yet."""
        fresh = {key: torch.zeros_like(parameter) for key in MOMENTS} | {"step": torch.tensor(0.0)}
        return {**fresh, **self.optimizer.state[parameter]}


class DeepSpeedEngine:
    """DeepSpeed with ZeRO; the client optimiser is torch's AdamW, so nothing needs a compiler."""

    name = "deepspeed"

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World):
        self.parameters, self.settings, self.world = parameters, settings, world
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.startswith("cuda") else "cpu")
        import deepspeed

        if world.size == 1:
            _single_process_rendezvous()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a CPU extra that would compile for minutes
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=nn.ParameterList(parameters.values()),
            model_parameters=list(parameters.values()),
            optimizer=adamw(parameters.values(), settings.optimizer),
            config=self._config(),
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)  # it takes the mean over processes

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()  # ZeRO itself drops a gradient whose norm is not finite, and then gives that as inf
        return float(self.engine.get_global_grad_norm())

    def state(self) -> dict[str, dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        steps = self._moments()[0].cpu()
        return {
            name: {"value": safe_get_full_fp32_param(parameter).cpu(), "step": steps.clone()}
            | {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        done = max(entry["step"] for entry in state.values())  # fewer for a parameter without gradients
        for steps in self._moments():
            steps.copy_(done)
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name]["value"])
            safe_set_full_fp32_param(parameter, state[name]["value"].to(parameter.device))
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state[name][key].to(parameter.device), key)

    def _moments(self) -> list[Tensor]:
        """Make sure that all Adam moments exist and are linked to their parameters; returns each group's step count.

        ZeRO links them in its first step, but only those of the first parameter group, and before that there are none.
        """
        inner = self.optimizer.optimizer.state
        for flat in self.optimizer.single_partition_of_fp32_groups:
            inner[flat].setdefault("step", torch.tensor(0.0))
            for key in MOMENTS:
                inner[flat].setdefault(key, torch.zeros_like(flat))
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()
        return [inner[flat]["step"] for flat in self.optimizer.single_partition_of_fp32_groups]

    def _config(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "train_micro_batch_size_per_gpu": 1,  # what batches are made of is decided elsewhere
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.optimizer.clip_grad_norm,
            "zero_optimization": {"stage": settings.deepspeed.zero_stage},
            "zero_allow_untested_optimizer": True,
        }


def _single_process_rendezvous() -> None:
    """What torchrun would have set; DeepSpeed looks for MPI otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        os.environ.setdefault(name, value)
