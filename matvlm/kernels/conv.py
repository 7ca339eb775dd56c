"""The short causal depthwise convolution before the scan.

Shapes: B batch, L tokens, D channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from matvlm.kernels import has_fused_conv, load_function, resolve_backend


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    initial_state: Tensor | None = None,
    silu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``y[t, d] = act(bias[d] + sum over lags j of weight[d, K - 1 - j] * x[t - j, d])``; differentiable once.

    Args:
        x: [B, L, D].
        weight: [D, K]; the last tap meets the current token.
        bias: [D].
        initial_state: [B, D, K - 1], the inputs before the first token, oldest first; None means zeros.
        silu: SiLU after the convolution, else nothing.
        backend: see ``matvlm.kernels.resolve_backend``.

    Returns:
        y [B, L, D], and the last K - 1 inputs [B, D, K - 1]: the ``initial_state`` of a call that goes on from here.
    """
    before = 0 if initial_state is None else initial_state.shape[-1]
    if initial_state is not None:
        if x.shape[1] == 1:
            return _one_token(x, weight, bias, initial_state, silu)
        x = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    if resolve_backend(backend, x.device) == "mamba_ssm" and _fused_takes(x, weight):
        fused = load_function("causal_conv1d", "causal_conv1d_fn")
        if x.stride(0) % 8 or x.stride(1) % 8 or x.stride(2) != 1:  # it reads eight channels at a time
            x = x.clone(memory_format=torch.contiguous_format)
        y = fused(x.transpose(1, 2), weight, bias, activation="silu" if silu else None).transpose(1, 2)
    else:
        y = _CausalConv.apply(x, weight.to(x.dtype), bias.to(x.dtype))
        y = F.silu(y) if silu else y
    state = x[:, max(0, x.shape[1] - weight.shape[1] + 1) :].transpose(1, 2)
    return y[:, before:], F.pad(state, (weight.shape[1] - 1 - state.shape[-1], 0))


def _fused_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether causal-conv1d is there and has a kernel for this device and these numbers of channels and taps."""
    return x.is_cuda and x.shape[2] % 8 == 0 and 2 <= weight.shape[1] <= 4 and has_fused_conv()


def _one_token(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """``causal_conv1d`` for x [B, 1, D] in few operations, for decoding."""
    window = torch.cat([state.to(x.dtype), x.transpose(1, 2)], dim=-1)
    y = (window * weight.to(x.dtype)).sum(-1) + bias.to(x.dtype)
    return (F.silu(y) if silu else y)[:, None], window[..., 1:]


class _CausalConv(torch.autograd.Function):
    """The convolution from zeros, lag by lag: on a CPU half the time of torch's grouped convolution, and no padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], weight [D, K], bias [D] -> [B, L, D]."""
        ctx.save_for_backward(x, weight)
        y = torch.addcmul(bias, x, weight[:, -1])
        for lag in range(1, min(weight.shape[1], x.shape[1])):
            y[:, lag:].addcmul_(x[:, :-lag], weight[:, -1 - lag])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, dweight = dy * weight[:, -1], torch.zeros_like(weight)
        dweight[:, -1] = (dy * x).sum((0, 1))
        for lag in range(1, min(weight.shape[1], x.shape[1])):
            dx[:, :-lag].addcmul_(dy[:, lag:], weight[:, -1 - lag])
            dweight[:, -1 - lag] = (dy[:, lag:] * x[:, :-lag]).sum((0, 1))
        return dx, dweight, dy.sum((0, 1))
