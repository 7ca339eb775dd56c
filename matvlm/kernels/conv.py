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
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``y[t, d] = act(bias[d] + sum over lags j of weight[d, K - 1 - j] * x[t - j, d])``; differentiable once.

    Args:
        x: [B, L, D].
        weight: [D, K]; the last tap meets the current token.
        bias: [D].
        initial_state: [B, D, K - 1], the inputs before the first token, oldest first; None means zeros.
        silu: SiLU after the convolution, else nothing.
        backend: see ``matvlm.kernels.resolve_backend``.
        seq_idx: int32 [B, L], which sample of a packed row each token is of, never falling: to every sample the tokens
            of others are zeros. ``initial_state`` is of the first sample, the final one of the last.

    Returns:
        y [B, L, D], and the last K - 1 inputs [B, D, K - 1]: the ``initial_state`` of a call that goes on from here.
    """
    before = 0 if initial_state is None else initial_state.shape[-1]
    if initial_state is not None:
        if x.shape[1] == 1:
            return _one_token(x, weight, bias, initial_state, silu)
        x = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
        seq_idx = None if seq_idx is None else torch.cat([seq_idx[:, :1].expand(-1, before), seq_idx], dim=1)
    if resolve_backend(backend, x.device) == "mamba_ssm" and _fused_takes(x, weight):
        y = _fused(x, weight, bias, silu, seq_idx)
    else:
        y = _CausalConv.apply(x, weight.to(x.dtype), bias.to(x.dtype), seq_idx)
        y = F.silu(y) if silu else y
    last = slice(max(0, x.shape[1] - weight.shape[1] + 1), None)
    state = x[:, last]
    if seq_idx is not None:
        state = state.masked_fill((seq_idx[:, last] != seq_idx[:, -1:])[..., None], 0.0)
    return y[:, before:], F.pad(state.transpose(1, 2), (weight.shape[1] - 1 - state.shape[1], 0))


@torch.compiler.disable
def _fused(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, seq_idx: Tensor | None) -> Tensor:
    """``causal_conv1d`` from zeros by causal-conv1d's kernel."""
    convolve = load_function("causal_conv1d", "causal_conv1d_fn")
    if x.stride(0) % 8 or x.stride(1) % 8 or x.stride(2) != 1:  # it reads eight channels at a time
        x = x.clone(memory_format=torch.contiguous_format)
    activation = "silu" if silu else None
    y: Tensor = convolve(x.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation=activation)
    return y.transpose(1, 2)


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
        """x [B, L, D], weight [D, K], bias [D], seq_idx [B, L] -> [B, L, D]."""
        ctx.save_for_backward(x, weight, seq_idx)
        y = torch.addcmul(bias, x, weight[:, -1])
        for lag in range(1, min(weight.shape[1], x.shape[1])):
            y[:, lag:].addcmul_(_of_one_sample(x[:, :-lag], lag, seq_idx), weight[:, -1 - lag])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, seq_idx = ctx.saved_tensors
        dx, dweight = dy * weight[:, -1], torch.zeros_like(weight)
        dweight[:, -1] = (dy * x).sum((0, 1))
        for lag in range(1, min(weight.shape[1], x.shape[1])):
            later = _of_one_sample(dy[:, lag:], lag, seq_idx)
            dx[:, :-lag].addcmul_(later, weight[:, -1 - lag])
            dweight[:, -1 - lag] = (later * x[:, :-lag]).sum((0, 1))
        return dx, dweight, dy.sum((0, 1)), None


def _of_one_sample(pairs: Tensor, lag: int, seq_idx: Tensor | None) -> Tensor:
    """``pairs`` [B, L - lag, D], one for each token and that ``lag`` before it: 0 where the two are of two samples."""
    if seq_idx is None:
        return pairs
    return pairs.masked_fill((seq_idx[:, lag:] != seq_idx[:, :-lag])[..., None], 0.0)
