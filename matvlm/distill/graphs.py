"""Passes through the student's decoder, recorded as CUDA graphs and replayed.

A small micro-batch is thousands of kernels that a GPU finishes sooner than its host can launch them one by one. A graph
launches them all at once. It is recorded for one shape, so lengths are rounded up to multiples of ``STEP``.

Shapes: B samples, L tokens, W hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matvlm.recording import record, warm_up

STEP = 64

Function = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """Functions of tensors that use ``module``, recorded with their backward passes: one graph a function and shape.

    Only one of them is in use at a time: its backward pass comes before another's forward pass. So all share memory,
    that of the largest, and the buffers in which they leave the gradients of the module's trained parameters.
    """

    def __init__(self, module: nn.Module, device: str):
        """Without effect on speed where ``device`` has no CUDA graphs: there a function is called for every replay."""
        self.places = [
            (owner, name)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if parameter.requires_grad
        ]
        self.on_gpu = device.startswith("cuda")
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.parameters: list[nn.Parameter] = []
        self.stand_ins: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []
        self.recorded: dict[Any, _Graph] = {}

    def call(self, name: Any, function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What ``function``, which is always the same for one ``name``, makes of ``tensors``; with gradient.

        Besides, it may use the module and any tensors that stay where they are, and must not wait for the GPU. Each
        of its outputs needs to have a gradient.
        """
        if not self.parameters:
            self.parameters = [getattr(owner, name) for owner, name in self.places]
            self.stand_ins = [nn.Parameter(parameter.detach()) for parameter in self.parameters]
            self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        key = (name, *((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors))
        if key not in self.recorded:
            self.recorded[key] = _Graph(self, function, tensors)
        outputs: tuple[Tensor, ...] = _Replayed.apply(self.recorded[key], *tensors, *self.parameters)
        return outputs

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Inside, the module has other parameters with the same memory.

        Where the gradients of its own are added up is bound to the stream of whoever was first to ask for one, which a
        recording, on a stream of its own, cannot wait for.
        """
        for (owner, name), stand_in in zip(self.places, self.stand_ins, strict=True):
            owner._parameters[name] = stand_in
        try:
            yield
        finally:
            for (owner, name), parameter in zip(self.places, self.parameters, strict=True):
                owner._parameters[name] = parameter


class _Graph:
    def __init__(self, graphs: Graphs, function: Function, tensors: Sequence[Tensor]):
        self.graphs, self.function = graphs, function
        self.given = [torch.empty_like(t).copy_(t.detach()).requires_grad_(t.requires_grad) for t in tensors]
        self.outputs: Sequence[Tensor] = []
        self.upstream: list[Tensor] = []
        self.returned: list[Tensor] = []
        if graphs.on_gpu:
            self._warm_up()
        self.replay_forward = self._record(self.forward)
        self.replay_backward = self._record(self.backward)
        self.outputs = [made.detach() for made in self.outputs]  # lets go of what a backward pass needs

    def forward(self) -> None:
        with torch.enable_grad(), self.graphs.standing_in():
            self.outputs = self.function(*self.given)

    def backward(self) -> None:
        """From ``upstream``, the gradients of ``outputs``, to those of what was given and of the parameters."""
        wanted = [tensor for tensor in self.given if tensor.requires_grad]
        sources = [*wanted, *self.graphs.stand_ins]
        with self.graphs.standing_in():  # also for what is computed anew
            found = torch.autograd.grad(self.outputs, sources, self.upstream, allow_unused=True)
        self.returned = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=False)]
        for buffer, gradient in zip(self.graphs.gradients, found[len(wanted) :], strict=True):
            buffer.zero_() if gradient is None else buffer.copy_(gradient)

    def _warm_up(self) -> None:
        def both_ways() -> None:
            self.forward()
            self.upstream = [torch.zeros_like(made) for made in self.outputs]
            self.backward()

        warm_up(both_ways)
        self.outputs, self.returned = [], []

    def _record(self, run: Callable[[], None]) -> Callable[[], None]:
        return record(run, self.graphs.pool).replay if self.graphs.on_gpu else run


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        with torch.no_grad():
            for place, value in zip(graph.given, tensors, strict=False):  # the parameters, which follow, stay in place
                place.copy_(value)
        graph.replay_forward()
        return tuple(made.detach().clone() for made in graph.outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        graph.upstream = graph.upstream or [torch.empty_like(gradient) for gradient in upstream]
        for place, value in zip(graph.upstream, upstream, strict=True):
            place.copy_(value)
        graph.replay_backward()
        returned = iter(graph.returned)
        own = [next(returned).clone() if tensor.requires_grad else None for tensor in graph.given]
        return None, *own, *graph.graphs.gradients


def rounded(tensor: Tensor) -> Tensor:
    """``tensor`` [B, L, ...] with zeros at the end, up to the next length that is a multiple of ``STEP``."""
    missing = -tensor.shape[1] % STEP
    return F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, missing]) if missing else tensor
