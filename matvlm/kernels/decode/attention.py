"""Attention of one new token over the filled part of its cache, in pieces that many multiprocessors share.

Each piece of the columns is a program of its own (flash decoding); whichever of a head's programs is last puts the
pieces together. The new token's key goes from its projection to the cache in the same launch.
Shapes: B sequences, H query heads, KV key/value heads, T columns, P head width, R rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from matvlm.kernels.decode.rotary import turn

PROGRAMS = 512
"""So many, where sequences and heads are fewer: they all run at once on an H100, four to a multiprocessor."""
MORE = 2048
"""So many, where they are more: what is left over when most are done is little."""
LEAST = 64
"""Columns that a program of its own is worth."""


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each head of q and k: factors [P], and epsilon."""

    q: Tensor
    k: Tensor
    eps: float


class Scratch:
    """How ``batch`` sequences are cut into pieces, and where those are kept until they are put together."""

    def __init__(self, batch: int, heads: int, kv_heads: int, width: int, device: torch.device):
        rows = batch * kv_heads
        few = rows <= PROGRAMS
        self.pieces = max(1, (PROGRAMS if few else MORE) // rows)
        self.tiles = {"BLOCK": 32 if few else 64, "num_warps": 4, "num_stages": 3 if few else 2}
        shape = (batch * heads, self.pieces)
        self.sums = torch.empty(*shape, _wide(width), dtype=torch.float32, device=device)
        self.peaks = torch.empty(*shape, 2, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(batch * kv_heads, dtype=torch.int32, device=device)


def decode(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    out: Tensor,
    scratch: Scratch,
    rotary: tuple[Tensor, Tensor] | None = None,
    norms: HeadNorms | None = None,
    window: int | None = None,
    softcap: float | None = None,
    store: bool = True,
) -> None:
    """What ``matvlm.kernels.attention.decode_attention`` computes, from the projections on.

    Args:
        qkv: [B, (H + 2 KV) P], the heads of q, k and v side by side; [B, H P] with q alone, as it is to be used, where
            not ``store``.
        keys, values: [B, KV, T, P]; the new token's are put at column ``end`` if ``store``, else they are there.
        first, end: int64 [B] and [1], on the device.
        out: [B, H P], any row stride.
        rotary: (cos, sin) [B or 1, R] each; halves are paired.
    """
    batch, kv_heads, _, width = keys.shape
    heads = out.shape[1] // width
    groups = heads // kv_heads
    cos, sin = rotary if rotary is not None else (qkv, qkv)
    _decode[(batch * kv_heads, scratch.pieces)](
        qkv, qkv.stride(0), keys, values, keys.stride(0), keys.stride(1), first, end, out, out.stride(0),
        cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0,
        qkv if norms is None else norms.q, qkv if norms is None else norms.k, 0.0 if norms is None else norms.eps,
        scratch.sums, scratch.peaks, scratch.arrived, scale, window or 0, softcap or 0.0, kv_heads,
        WINDOW=window is not None, SOFTCAP=softcap is not None, STORE=store, NORMS=norms is not None,
        R=cos.shape[-1] if rotary is not None else 0, GROUPS=groups, GROUP_ROWS=max(16, triton.next_power_of_2(groups)),
        P=width, WIDE=_wide(width), PIECES=scratch.pieces,
        PIECE_ROWS=triton.next_power_of_2(scratch.pieces), LEAST=LEAST, **scratch.tiles,
    )  # fmt: skip


def _wide(width: int) -> int:
    """A head in a block of 2^n channels, of as many as a matrix product takes."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def _head(
    base, channel, factors, eps, cos, sin, inside, NORMS: tl.constexpr, R: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Heads at ``base`` [G, 1], normed and rotated: [G, WIDE] float32."""
    x = tl.load(base + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.full([x.shape[0], 1], 1.0, dtype=tl.float32)
    if NORMS:
        scale = (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / P + eps))[:, None]
        x = x * scale * tl.load(factors + channel, mask=channel < P, other=0.0).to(tl.float32)[None, :]
    if R > 0:
        partner, c, s = turn(channel, cos, sin, R)
        other = tl.load(base + partner[None, :], mask=inside, other=0.0).to(tl.float32) * scale
        if NORMS:
            other *= tl.load(factors + partner, mask=partner < P, other=0.0).to(tl.float32)[None, :]
        x = x * c[None, :] + other * s[None, :]
    return x


@triton.jit
def _decode(
    qkv, qkv_stride, keys, values, batch_stride, head_stride, first, end, out, out_stride,
    cos, sin, rotary_stride, q_factors, k_factors, eps,
    sums, peaks, arrived, scale, window, softcap, kv_heads,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, STORE: tl.constexpr, NORMS: tl.constexpr, R: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    PIECES: tl.constexpr, PIECE_ROWS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, piece = tl.program_id(0), tl.program_id(1)
    sequence, kv_head = place // kv_heads, place % kv_heads
    channel, group = tl.arange(0, WIDE), tl.arange(0, GROUP_ROWS)
    heads = kv_heads * GROUPS
    row = qkv + sequence.to(tl.int64) * qkv_stride
    cos += sequence * rotary_stride
    sin += sequence * rotary_stride
    wide = (group < GROUPS)[:, None] & (channel < P)[None, :]
    base = row + (kv_head * GROUPS + group)[:, None] * P
    query = _head(base, channel, q_factors, eps, cos, sin, wide, NORMS, R, P)
    kind: tl.constexpr = keys.dtype.element_ty
    q = query.to(kind)

    newest = tl.load(end)
    start = tl.load(first + sequence)
    if WINDOW:
        start = tl.maximum(start, newest + 1 - window)
    stop = newest + (0 if STORE else 1)  # the new one's own column is known without looking
    share = tl.maximum(tl.cdiv(tl.cdiv(stop - start, PIECES), BLOCK) * BLOCK, LEAST)
    used = tl.maximum(tl.cdiv(stop - start, share), 1).to(tl.int32)
    if piece >= used:
        return
    begin = start + piece * share
    finish = tl.minimum(begin + share, stop)

    offset = sequence.to(tl.int64) * batch_stride + kv_head.to(tl.int64) * head_stride
    peak = tl.full([GROUP_ROWS], -1e30, dtype=tl.float32)
    mass = tl.zeros([GROUP_ROWS], dtype=tl.float32)
    total = tl.zeros([GROUP_ROWS, WIDE], dtype=tl.float32)
    for at in range(begin, finish, BLOCK):
        column = at + tl.arange(0, BLOCK)
        there = column < finish
        spot = column.to(tl.int64) * P
        k = tl.load(
            keys + offset + spot[None, :] + channel[:, None], mask=(channel < P)[:, None] & there[None, :], other=0.0
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(there[None, :], scores, -1e30)
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        weights = tl.where(there[None, :], weights, 0.0)
        shrink = tl.exp(peak - higher)
        v = tl.load(
            values + offset + spot[:, None] + channel[None, :], mask=there[:, None] & (channel < P)[None, :], other=0.0
        )
        total = total * shrink[:, None] + tl.dot(weights.to(kind), v, input_precision="ieee")
        mass = mass * shrink + tl.sum(weights, axis=1)
        peak = higher

    if STORE:  # noqa: SIM102  known when compiling, the other is not
        if piece == used - 1:
            one = tl.zeros([1, WIDE], dtype=tl.int32) + channel[None, :]
            solo = one < P
            k_base = row + (heads + kv_head) * P + tl.zeros([1, 1], dtype=tl.int32)
            v_base = row + (heads + kv_heads + kv_head) * P
            k_new = tl.sum(_head(k_base, channel, k_factors, eps, cos, sin, solo, NORMS, R, P), axis=0).to(kind)
            v_new = tl.load(v_base + channel, mask=channel < P, other=0.0)
            spot = offset + newest.to(tl.int64) * P + channel
            tl.store(keys + spot, k_new, mask=channel < P)
            tl.store(values + spot, v_new.to(kind), mask=channel < P)
            score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], axis=1) * scale
            if SOFTCAP:
                score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
            higher = tl.maximum(peak, score)
            shrink, weight = tl.exp(peak - higher), tl.exp(score - higher)
            total = total * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)[None, :]
            mass = mass * shrink + weight
            peak = higher

    head = sequence * heads + kv_head * GROUPS + group
    if PIECES == 1:
        result = total / mass[:, None]
        spot = out + sequence.to(tl.int64) * out_stride + (kv_head * GROUPS + group)[:, None] * P + channel[None, :]
        tl.store(spot, result, mask=wide)
    else:
        own = head.to(tl.int64) * PIECES + piece
        tl.store(sums + own[:, None] * WIDE + channel[None, :], total, mask=(group < GROUPS)[:, None])
        tl.store(peaks + own * 2, peak, mask=group < GROUPS)
        tl.store(peaks + own * 2 + 1, mass, mask=group < GROUPS)
        tl.debug_barrier()
        before = tl.atomic_add(arrived + place, 1, sem="acq_rel")
        if before == used - 1:
            tl.store(arrived + place, 0)
            pieces = tl.arange(0, PIECE_ROWS)
            for member in range(GROUPS):
                index = (sequence * heads + kv_head * GROUPS + member).to(tl.int64) * PIECES + pieces
                there = pieces < used
                each = tl.load(peaks + index * 2, mask=there, other=-1e30, cache_modifier=".cg")
                masses = tl.load(peaks + index * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
                factor = tl.exp(each - tl.max(each))
                spots = sums + index[:, None] * WIDE + channel[None, :]
                parts = tl.load(spots, mask=there[:, None], other=0.0, cache_modifier=".cg")
                result = tl.sum(parts * factor[:, None], axis=0) / tl.sum(masses * factor)
                spot = out + sequence.to(tl.int64) * out_stride + (kv_head * GROUPS + member) * P + channel
                tl.store(spot, result, mask=channel < P)
