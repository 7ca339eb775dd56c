"""The engine on DeepSpeed: ZeRO shares optimiser (1), gradients (2) and weights (3) among the processes.

Its losses are made by our own calls of parts of the model and never by a call of DeepSpeed's engine. ZeRO-3 needs none:
its hooks are on every module inside of what it is given, gather that module's weights before it runs, forward or
backward, and let go of them afterwards. All processes have to run the same modules in the same order, which they do as
long as they make the same number of micro-batches; the head, which runs as often as a batch has chunks, is not given.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from matvlm.config import Distill
from matvlm.distill.engine import MOMENTS, TorchEngine, set_rate
from matvlm.distill.trunk import SharedTrunk
from matvlm.models.hybrid import decoder_layers, find_connector
from matvlm.optimizer import adamw
from matvlm.world import World


def deepspeed_engine(
    parameters: dict[str, nn.Parameter],
    settings: Distill,
    device: str,
    world: World,
    modules: Sequence[nn.Module] = (),
) -> PlainEngine | ZeroEngine | Zero3Engine:
    """The engine for ``settings.deepspeed.zero_stage``; see ``make_engine``."""
    stage = settings.deepspeed.zero_stage
    if stage == 3:
        return Zero3Engine(parameters, settings, device, world, modules)
    return (ZeroEngine if stage else PlainEngine)(parameters, settings, device, world)


BUCKET = 50_000_000
"""Elements of gradients that GPUs sum together while others are still computed; one mixer of Phi-2 has 33 million."""


def shareable(trunk: SharedTrunk) -> list[nn.Module]:
    """The modules of ``trunk`` that hold nearly all weights of student and teacher, none inside of another.

    Embeddings and head are not among them.
    """
    several = [*decoder_layers(trunk.student), *trunk.attentions.values(), trunk.tower, find_connector(trunk.student)]
    return [module for module in several if module is not None]


def _initialize(
    module: nn.Module, parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World, clip: float
) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimiser. The client optimiser is torch's AdamW, so nothing needs a compiler."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.startswith("cuda") else "cpu")
    import deepspeed

    if world.size == 1:
        _single_process_rendezvous()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a CPU extra that would compile for minutes
    chosen = settings.deepspeed
    zero: dict[str, Any] = {"stage": chosen.zero_stage}
    # Else gradients are summed in one piece, when all are there. Stage 1 is not trusted with it; stage 3 has it anyway.
    if device.startswith("cuda") and chosen.zero_stage == 2:
        zero |= {"overlap_comm": True, "reduce_bucket_size": BUCKET}
    if chosen.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device != "cpu"}
    if chosen.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device != "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,  # what batches are made of is decided elsewhere
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # On the CPU torch's AdamW is a loop over many small operations unless it is fused.
    fused = True if chosen.offload_optimizer else None
    engine, optimizer, _, _ = deepspeed.initialize(
        model=module,
        model_parameters=list(parameters.values()),
        optimizer=adamw(parameters.values(), settings.optimizer, fused),
        config=config,
    )
    return engine, optimizer


class _Backward:
    """What all stages have in common: ``name``, and that DeepSpeed takes the mean of the processes' gradients."""

    name = "deepspeed"
    engine: Any
    world: World

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)


class PlainEngine(_Backward, TorchEngine):
    """ZeRO stage 0: every process has everything, and DeepSpeed averages the gradients."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World):
        self.parameters, self.settings, self.world = parameters, settings, world
        # It clips by itself without looking whether the norm is finite.
        self.engine, self.optimizer = _initialize(
            nn.ParameterList(parameters.values()), parameters, settings, device, world, clip=0.0
        )

    def step(self, lr: float) -> float:
        set_rate(self.optimizer, lr)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.optimizer.clip_grad_norm))
        if math.isfinite(norm):
            self.engine.step()
        self.engine.zero_grad()
        return norm


class ZeroEngine(_Backward):
    """ZeRO stages 1 and 2, which are given the trained parameters alone."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World):
        self._start(nn.ParameterList(parameters.values()), parameters, settings, device, world)

    def _start(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], settings: Distill, device: str, world: World
    ) -> None:
        self.parameters, self.world = parameters, world
        clip = settings.optimizer.clip_grad_norm
        self.engine, self.optimizer = _initialize(module, parameters, settings, device, world, clip)

    def step(self, lr: float) -> float:
        set_rate(self.optimizer, lr)
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
        done = max(entry["step"] for entry in state.values())  # fewer for a parameter without gradients
        for steps in self._moments():
            steps.copy_(done)
        for name, parameter in self.parameters.items():
            self._load(parameter, state[name])

    @contextmanager
    def whole(self) -> Iterator[None]:
        yield

    def _load(self, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.copy_(saved["value"])
        safe_set_full_fp32_param(parameter, saved["value"].to(parameter.device))
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, saved[key].to(parameter.device), key)

    def _moments(self) -> list[Tensor]:
        """Make sure that all Adam moments exist and are linked to their parameters; returns each group's step count.

        ZeRO links them in its first step, but only those of the first parameter group, and before that there are none.
        """
        steps = self._steps(self.optimizer.single_partition_of_fp32_groups)
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()
        return steps

    def _steps(self, masters: Sequence[Tensor]) -> list[Tensor]:
        """The step count of each of the flat ``masters``; what AdamW has not made yet is made."""
        inner = self.optimizer.optimizer.state
        for flat in masters:
            inner[flat].setdefault("step", torch.tensor(0.0))
            for key in MOMENTS:
                inner[flat].setdefault(key, torch.zeros_like(flat))
        return [inner[flat]["step"] for flat in masters]


class Zero3Engine(ZeroEngine):
    """ZeRO stage 3: the weights of whole modules, trained or not, are shared too.

    From then on DeepSpeed's own ``linear`` takes the place of torch's in this process, else the backward pass would
    hold on to all gathered weights. It rounds a second time where it adds a bias, which shows in half precision.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: Distill,
        device: str,
        world: World,
        modules: Sequence[nn.Module],
    ):
        if settings.compile:
            raise ValueError(
                "distill.compile does not know the weights that distill.deepspeed.zero_stage 3 gathers and releases: "
                "switch it off, or use stage 2"
            )
        self.modules = nn.ModuleList(modules)
        missing = {id(p) for p in parameters.values()} - {id(p) for p in self.modules.parameters()}
        if missing:
            raise ValueError(f"{len(missing)} trained parameters are in none of the modules for ZeRO-3")
        self._start(self.modules, parameters, settings, device, world)
        for parameter in parameters.values():
            parameter.register_hook(partial(_lend_shape, parameter))
            parameter.register_post_accumulate_grad_hook(_take_shape_back)
        for module in modules:
            module.register_forward_pre_hook(self._release)

    def _release(self, *_: object) -> None:
        """Let go of what a gradient taken in the forward pass (``TeacherForced``) has gathered.

        ZeRO does so by itself only behind modules whose input has a gradient.
        """
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass, which computes some layers anew
            self.optimizer.parameter_offload.release_backward_leftovers()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.optimizer.clear_backward_seen_flag()  # else a micro-batch's gradients replace those before
        super().backward(loss, last)

    def step(self, lr: float) -> float:
        norm = super().step(lr)
        self.optimizer.grad_partitions_flat_buffer.zero_()  # else they stay, for what gets no gradient next time
        return norm

    @contextmanager
    def whole(self) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.modules.parameters())):
            yield

    def _load(self, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        shard: Any = parameter
        size = shard.ds_tensor.ds_numel

        def own(value: Tensor) -> Tensor:
            """This process's part, which the last one's parameter may not fill."""
            flat = nn.functional.pad(value.flatten(), (0, size * self.world.size - value.numel()))
            return flat.narrow(0, size * self.world.rank, size).to(shard.ds_tensor.device)

        shard.ds_tensor.copy_(own(saved["value"]))
        safe_set_local_fp32_param(parameter, own(saved["value"]))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, own(saved[key]), key)

    def _moments(self) -> list[Tensor]:
        self.optimizer._partition_all_parameters()  # small weights stay whole otherwise
        return self._steps(self.optimizer.fp32_partitioned_groups_flat)


def _lend_shape(parameter: Any, gradient: Tensor) -> None:
    """Autograd puts a gradient into the form of its weight, which is not there if the gradient was ``known`` before."""
    if parameter.numel() != parameter.ds_numel:
        parameter.data = gradient.detach()


def _take_shape_back(parameter: Any) -> None:
    if parameter.ds_status.name == "NOT_AVAILABLE":
        parameter.data = parameter.new_empty(0)


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
