"""Linear layers of a few rows, with an activation or residuals after them, and the norms between; weights are read
once.

The weights stay where the model has them: q, k and v are one launch over three matrices. Sums are in float32. Shapes: B
rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"identity": 0, "gelu_tanh": 1, "gelu": 2, "silu": 3}


@dataclass(frozen=True)
class Norm:
    """A layer norm, with factors and offsets [K], or an RMS norm, without offsets."""

    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class Linear:
    """A weight [N, K], contiguous, and a bias [N] or None, as ``nn.Linear`` has them."""

    weight: Tensor
    bias: Tensor | None


def normalize(out: Tensor, x: Sequence[Tensor], norm: Norm) -> None:
    """``out = norm(sum of x)``, for one tensor [B, K] or two."""
    rows, width = out.shape
    _normalize[(rows,)](
        out, x[0], x[-1], norm.weight, norm.weight if norm.bias is None else norm.bias, norm.eps, width,
        LAYER=norm.bias is not None, TWO=len(x) > 1, WIDE=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip


def project(
    x: Tensor,
    parts: Sequence[Linear],
    out: Tensor,
    activation: str = "identity",
    gated: bool = False,
) -> None:
    """``activation(part(x))`` for each of up to three ``parts``.

    Args:
        x: [B, K].
        out: [B, sum of N] or wider, gets all parts side by side.
        gated: ``out``, [B, N], gets ``activation(parts[0](x)) * parts[1](x)`` instead.
    """
    rows, width = x.shape
    missing = 3 - len(parts)
    sizes = [part.weight.shape[0] for part in parts] + [0] * missing
    if gated:
        sizes[1] = 0
    tiles = _tiles(rows, sizes[0], width)
    weights = [part.weight for part in parts] + [parts[0].weight] * missing
    biases = [part.weight if part.bias is None else part.bias for part in parts] + [parts[0].weight] * missing
    biased = {part.bias is not None for part in parts}
    if len(biased) > 1:
        raise ValueError("parts of one projection have all a bias, or none")
    _project[(sum(triton.cdiv(size, tiles["BLOCK_N"]) for size in sizes),)](
        x, x.stride(0), *weights, *biases, out, out.stride(0), *sizes, rows, width,
        BIASED=biased == {True}, ACTIVATION=ACTIVATIONS[activation], GATED=gated, **tiles,
    )  # fmt: skip


def add_projected(out: Tensor, residuals: Sequence[Tensor], x: Tensor, part: Linear) -> None:
    """``out = sum of residuals + part(x)``, with up to two residuals [B, N], of which ``out`` may be one."""
    rows, outputs = out.shape
    width = x.shape[1]
    tiles = _tiles(rows, outputs, width)
    first, other = (residuals[0], residuals[-1]) if residuals else (out, out)
    _add[(triton.cdiv(outputs, tiles["BLOCK_N"]),)](
        x, x.stride(0), part.weight, part.weight if part.bias is None else part.bias,
        first, other, first.stride(0), out, out.stride(0), outputs, rows, width,
        RESIDUALS=len(residuals), BIASED=part.bias is not None, **tiles,
    )  # fmt: skip


def _tiles(rows: int, outputs: int, width: int) -> dict[str, int]:
    """Block sizes and warps, found by trying on an H100."""
    if rows == 1:
        few = outputs < 4096
        return {"ROWS": 1, "BLOCK_N": 2 if few else 8, "BLOCK_K": 1024 if few else 512, "num_warps": 4, "num_stages": 3}
    return {
        "ROWS": max(16, triton.next_power_of_2(rows)),
        "BLOCK_N": 32,
        "BLOCK_K": 256 if rows <= 32 else 128,
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def _normalize(
    out, x, x_too, factors, offsets, eps, K, LAYER: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDE)
    there = column < K
    spot = tl.program_id(0) * K + column
    v = tl.load(x + spot, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(factors + column, mask=there, other=0.0).to(tl.float32)
    if TWO:
        v += tl.load(x_too + spot, mask=there, other=0.0).to(tl.float32)
    if LAYER:
        offset = tl.load(offsets + column, mask=there, other=0.0).to(tl.float32)
        v = tl.where(there, v - tl.sum(v) / K, 0.0)
    v = v / tl.sqrt(tl.sum(v * v) / K + eps) * factor
    if LAYER:
        v += offset
    tl.store(out + spot, v, mask=there)


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == 1:
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == 3:
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def _tile(w, start, first, inside, K, BLOCK_K: tl.constexpr):
    """A block of weights, which nobody needs again before all others have been read."""
    column = first + tl.arange(0, BLOCK_K)
    mask = inside[:, None] & (column < K)[None, :]
    return tl.load(w + start + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(
    total, x, x_stride, w, outputs, inside, rows, K,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``total + w x``, [BLOCK_N, ROWS], of the weight's rows ``outputs``."""
    start = outputs.to(tl.int64)[:, None] * K
    if ROWS == 1:
        sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        tile = _tile(w, start, 0, inside, K, BLOCK_K)
        for first in range(0, K, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)
            coming = _tile(w, start, first + BLOCK_K, inside, K, BLOCK_K)
            v = tl.load(x + column, mask=column < K, other=0.0)
            sums += tile.to(tl.float32) * v.to(tl.float32)[None, :]
            tile = coming
        total += tl.sum(sums, axis=1)[:, None]
    else:
        row = tl.arange(0, ROWS)
        for first in range(0, K, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)
            tile = _tile(w, start, first, inside, K, BLOCK_K)
            mask = (column < K)[:, None] & (row < rows)[None, :]
            v = tl.load(x + row[None, :] * x_stride + column[:, None], mask=mask, other=0.0)
            total = tl.dot(tile, v, total, input_precision="ieee")
    return total


@triton.jit
def _project(
    x, x_stride, w0, w1, w2, b0, b1, b2, out, out_stride, n0, n1, n2, rows, K,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    w, b, n, before = w0, b0, n0, 0
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    if block >= end1:
        w, b, n, before, block = w2, b2, n2, n0 + n1, block - end1
    elif block >= end0:
        w, b, n, before, block = w1, b1, n1, n0, block - end0
    outputs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < n
    y = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    y = _product(y, x, x_stride, w, outputs, inside, rows, K, ROWS, BLOCK_N, BLOCK_K)
    if BIASED:
        y += tl.load(b + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    y = _activate(y, ACTIVATION)
    if GATED:
        u = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
        u = _product(u, x, x_stride, w1, outputs, inside, rows, K, ROWS, BLOCK_N, BLOCK_K)
        if BIASED:
            u += tl.load(b1 + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
        y *= u
    row = tl.arange(0, ROWS)
    there = inside[:, None] & (row < rows)[None, :]
    tl.store(out + row[None, :] * out_stride + before + outputs[:, None], y, mask=there)


@triton.jit
def _add(
    x, x_stride, w, b, residual, residual_too, residual_stride, out, out_stride, N, rows, K,
    RESIDUALS: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = outputs < N
    row = tl.arange(0, ROWS)
    there = inside[:, None] & (row < rows)[None, :]
    y = tl.zeros([BLOCK_N, ROWS], dtype=tl.float32)
    y = _product(y, x, x_stride, w, outputs, inside, rows, K, ROWS, BLOCK_N, BLOCK_K)
    if BIASED:
        y += tl.load(b + outputs, mask=inside, other=0.0).to(tl.float32)[:, None]
    spot = row[None, :] * residual_stride + outputs[:, None]
    if RESIDUALS > 0:
        y += tl.load(residual + spot, mask=there, other=0.0).to(tl.float32)
    if RESIDUALS > 1:
        y += tl.load(residual_too + spot, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row[None, :] * out_stride + outputs[:, None], y, mask=there)
