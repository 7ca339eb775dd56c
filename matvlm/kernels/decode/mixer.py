"""One token of a Mamba-2 mixer, from what ``in_proj`` gave to what ``out_proj`` gets: convolution, state, gated norm.

A program for each sequence and key/value head reads and writes its part of the states once.
Shapes: B sequences, H heads, KV heads of x and B, P head width (the state is P x P), K taps, R rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from matvlm.kernels.decode.rotary import turn


@dataclass(frozen=True)
class MixerWeights:
    """A mixer's parameters but its two projections, as ``matvlm.models.mixer.Mamba2Mixer`` has and uses them."""

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor
    B_norm_weight: Tensor | None
    C_norm_weight: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_silu: bool
    rotary: bool
    scale_input_by_dt: bool
    qk_norm_eps: float | None
    norm_eps: float


def step(
    projected: Tensor,
    conv_state: Tensor,
    state: Tensor,
    weights: MixerWeights,
    rotary: tuple[Tensor, Tensor] | None,
    out: Tensor,
) -> None:
    """Advance both states by one token and write the mixer's output before ``out_proj``.

    Args:
        projected: [B, HP + (2 KV + H) P + H], the output of ``in_proj``: z, x, B, C, dt.
        conv_state: [B, (2 KV + H) P, K - 1], changed in place; in projected's dtype.
        state: float32 [B, H, P, P], changed in place.
        rotary: (cos, sin) [B or 1, R] each, for a mixer that rotates.
        out: [B, H P], any row stride.
    """
    batch, heads, width, _ = state.shape
    kv_heads = weights.num_kv_heads
    cos, sin = rotary if rotary is not None and weights.rotary else (projected, projected)
    norms = weights.qk_norm_eps is not None
    _step[(batch * kv_heads,)](
        projected, projected.stride(0), conv_state, state, weights.conv_weight, weights.conv_bias, weights.dt_bias,
        weights.A_log, weights.D, weights.norm_weight,
        weights.B_norm_weight if norms else projected, weights.C_norm_weight if norms else projected,
        cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, out, out.stride(0),
        weights.qk_norm_eps or 0.0, weights.norm_eps, kv_heads,
        SILU=weights.conv_silu, SCALED=weights.scale_input_by_dt, NORMS=norms,
        R=cos.shape[-1] if weights.rotary else 0, GROUPS=heads // kv_heads, TAPS=weights.conv_weight.shape[1],
        P=width, WIDE=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip


@triton.jit
def _convolved(
    inputs, states, conv_weight, conv_bias, channel, there, SILU: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """The convolution's output for ``channel``s of (x, B, C), float32; states are not changed."""
    y = tl.load(conv_bias + channel, mask=there, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS - 1):
        weight = tl.load(conv_weight + channel * TAPS + tap, mask=there, other=0.0).to(tl.float32)
        y += weight * tl.load(states + channel * (TAPS - 1) + tap, mask=there, other=0.0).to(tl.float32)
    weight = tl.load(conv_weight + channel * TAPS + TAPS - 1, mask=there, other=0.0).to(tl.float32)
    y += weight * tl.load(inputs + channel, mask=there, other=0.0).to(tl.float32)
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def _shift(inputs, states, channel, there, TAPS: tl.constexpr):
    """The newest input comes in, the oldest goes out."""
    for tap in tl.static_range(TAPS - 2):
        later = tl.load(states + channel * (TAPS - 1) + tap + 1, mask=there)
        tl.store(states + channel * (TAPS - 1) + tap, later, mask=there)
    newest = tl.load(inputs + channel, mask=there)
    tl.store(states + channel * (TAPS - 1) + TAPS - 2, newest.to(states.dtype.element_ty), mask=there)


@triton.jit
def _turned(
    inputs, states, conv_weight, conv_bias, first, factors, eps, cos, sin,
    SILU: tl.constexpr, TAPS: tl.constexpr, NORMS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One head of B or C, from channel ``first`` on: convolved, normed, rotated; [WIDE] float32."""
    lane = tl.arange(0, WIDE)
    there = lane < P
    y = _convolved(inputs, states, conv_weight, conv_bias, first + lane, there, SILU, TAPS)
    scale = 1.0
    if NORMS:
        scale = 1.0 / tl.sqrt(tl.sum(y * y) / P + eps)
        y = y * scale * tl.load(factors + lane, mask=there, other=0.0).to(tl.float32)
    if R > 0:
        partner, c, s = turn(lane, cos, sin, R)
        other = _convolved(inputs, states, conv_weight, conv_bias, first + partner, there, SILU, TAPS)
        if NORMS:
            other = other * scale * tl.load(factors + partner, mask=there, other=0.0).to(tl.float32)
        y = y * c + other * s
    return y


@triton.jit
def _step(
    projected, stride, conv_state, state, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, B_factors, C_factors,
    cos, sin, rotary_stride, out, out_stride, qk_eps, norm_eps, kv_heads,
    SILU: tl.constexpr, SCALED: tl.constexpr, NORMS: tl.constexpr, R: tl.constexpr, GROUPS: tl.constexpr,
    TAPS: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    sequence, kv_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    heads = kv_heads * GROUPS
    lane = tl.arange(0, WIDE)
    there = lane < P
    cos += sequence * rotary_stride
    sin += sequence * rotary_stride
    z = projected + sequence.to(tl.int64) * stride
    inputs = z + heads * P
    dt = inputs + (2 * kv_heads + heads) * P
    states = conv_state + sequence.to(tl.int64) * (2 * kv_heads + heads) * P * (TAPS - 1)
    first_x, first_B, first_C = kv_head * P, (kv_heads + kv_head) * P, (2 * kv_heads + kv_head * GROUPS) * P

    x = _convolved(inputs, states, conv_weight, conv_bias, first_x + lane, there, SILU, TAPS)
    x = tl.where(there, x, 0.0)
    B = _turned(
        inputs, states, conv_weight, conv_bias, first_B, B_factors, qk_eps, cos, sin, SILU, TAPS, NORMS, R, P, WIDE
    )
    B = tl.where(there, B, 0.0)
    square = there[:, None] & there[None, :]
    for member in tl.static_range(GROUPS):
        head = kv_head * GROUPS + member
        C = _turned(
            inputs, states, conv_weight, conv_bias, first_C + member * P, C_factors, qk_eps, cos, sin,
            SILU, TAPS, NORMS, R, P, WIDE,
        )  # fmt: skip
        C = tl.where(there, C, 0.0)
        rate = tl.load(dt + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        rate = tl.where(rate > 20.0, rate, tl.log(1.0 + tl.exp(rate)))
        decay = tl.exp(-rate * tl.exp(tl.load(A_log + head).to(tl.float32)))
        spot = state + (sequence * heads + head).to(tl.int64) * P * P + lane[:, None] * P + lane[None, :]
        h = tl.load(spot, mask=square, other=0.0) * decay
        if SCALED:
            h += (x * rate)[:, None] * B[None, :]
        else:
            h += x[:, None] * B[None, :]
        tl.store(spot, h, mask=square)
        y = tl.sum(h * C[None, :], axis=1) + tl.load(D + head).to(tl.float32) * x
        gate = tl.load(z + head * P + lane, mask=there, other=0.0).to(tl.float32)
        y = y * gate * tl.sigmoid(gate)
        y = y / tl.sqrt(tl.sum(y * y) / P + norm_eps)
        y = y * tl.load(norm_weight + head * P + lane, mask=there, other=0.0).to(tl.float32)
        tl.store(out + sequence.to(tl.int64) * out_stride + head * P + lane, y, mask=there)
    tl.debug_barrier()  # every old input has been read
    _shift(inputs, states, first_x + lane, there, TAPS)
    _shift(inputs, states, first_B + lane, there, TAPS)
    for member in tl.static_range(GROUPS):
        _shift(inputs, states, first_C + member * P + lane, there, TAPS)
