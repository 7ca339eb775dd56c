"""Rotary position embedding inside a kernel: halves are paired, as in ``matvlm.models.mixer.rotate``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def turn(channel, cos, sin, R: tl.constexpr):
    """For each ``channel`` of a head, of which the first R are rotated: ``x[channel] * c + x[partner] * s``.

    Returns:
        (partner, c, s), the latter two float32.
    """
    HALF: tl.constexpr = R // 2
    rotated = channel < R
    partner = tl.where(rotated, tl.where(channel < HALF, channel + HALF, channel - HALF), channel)
    c = tl.load(cos + channel, mask=rotated, other=1.0).to(tl.float32)
    s = tl.load(sin + channel, mask=rotated, other=0.0).to(tl.float32)
    return partner, c, tl.where(channel < HALF, -s, s)
