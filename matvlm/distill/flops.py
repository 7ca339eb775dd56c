"""What the arithmetic of training amounts to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from matvlm.config import Loss
from matvlm.distill.feed import Group
from matvlm.distill.objective import Counts, Divisors
from matvlm.distill.step import Steps


def flops_per_token(steps: Steps, group: Group, settings: Loss) -> float:
    """Floating-point operations for a real token of ``group``: matrix products and attention, forward and backward.

    Counted while its first micro-batch runs once, which changes nothing. What ``activation_checkpointing`` computes
    anew is counted, the scan's own kernels are not.
    """
    part = group.parts[0]
    alone = Group(part, [part])
    counts = Counts.of([part])
    student = steps.trunk.student
    graphs, steps.graphs = steps.graphs, None  # a replay does not say what it does
    trained: list[nn.Parameter] = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with (
        torch.compiler.set_stance("force_eager"),
        FlopCounterMode(display=False, custom_mapping=attention_kernels()) as counter,
    ):
        for made in steps.passes(alone, Divisors.of([counts], settings.scaling), settings):
            torch.autograd.grad(made.loss, trained, allow_unused=True)
    steps.graphs = graphs
    return counter.get_total_flops() / counts.tokens


Shape = Sequence[int]


def attention_kernels() -> dict[Any, Callable[..., int]]:
    """What attention's kernels do, by kernel: torch 2.11 has no numbers for keys of fewer heads than queries (GQA)."""
    kernels = [kernel for kernel in flop_registry if "scaled_dot_product" in str(kernel)]
    return {kernel: _backward if "backward" in str(kernel) else _forward for kernel in kernels}


def _forward(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two matrix products for queries [B, H, Q, D], keys [B, G, K, D] and values [B, G, K, E], each of 2 H Q K D."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])
