"""Fewer kernels for what a model computes between its matrix products; never another weight."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers.activations import NewGELUActivation

RECOMPILATIONS = 64
"""A layer is compiled once for attention and once for a mixer, each with gradient and without, alone and in a batch."""


def fuse_activations_(model: nn.Module) -> None:
    """One kernel for ``gelu_new``, of which transformers makes eight, each with a tensor to keep.

    The same function (``gelu_pytorch_tanh``); in half precision it is rounded once and not after each of the eight.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def compile_(modules: Iterable[nn.Module]) -> None:
    """Let torch.compile fuse what ``modules`` do.

    Layers of one kind share what is compiled, once for the first length and once more, at the second, for all others.
    Kernels that are no part of torch stay as they are.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILATIONS, torch._dynamo.config.recompile_limit)
    for module in modules:
        vars(module)["forward"] = torch.compile(module.forward)
