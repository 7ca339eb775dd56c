"""A loss whose gradient has been computed already, as one node of autograd's graph.

What a piece of a loss needs for its backward pass can be freed as soon as that piece is done, and what is kept is the
gradient alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def known(loss: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """``loss`` with ``gradients`` for ``tensors``; its backward pass can be run once.

    Args:
        loss: a scalar without gradient.
        gradients: of ``loss``, in the shapes of ``tensors``; given away, as they are scaled in place.
    """
    result: Tensor = _Known.apply(loss, len(tensors), *tensors, *gradients)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[count:]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(upstream[0]) for gradient in gradients), *([None] * len(gradients))
