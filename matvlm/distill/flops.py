"""What the arithmetic of training amounts to."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        for made in steps.passes(alone, Divisors.of([counts], settings.scaling), settings):
            torch.autograd.grad(made.loss, trained, allow_unused=True)
    steps.graphs = graphs
    return counter.get_total_flops() / counts.tokens
