"""Tokens drawn from the tail of the teacher's distribution, the same ones whatever batch or shard a sample is in.

Shapes: P positions, V vocabulary, k exact tokens a position, S draws a position.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def uniforms(sample_id: str, positions: int, samples: int, seed: int) -> Tensor:
    """float64 [positions, samples] in [0, 1), decided by ``seed`` and ``sample_id``: one in each of S equal intervals.

    Each is uniform within its interval, so the mean of any function over a row is unbiased, with at most the
    variance of independent numbers.
    """
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    inside = torch.rand(positions, samples, generator=generator, dtype=torch.float64)
    return (torch.arange(samples) + inside) / samples


def draw_tail(logits: Tensor, token_ids: Tensor, uniform: Tensor) -> Tensor:
    """The tokens at which the tail's distribution function reaches ``uniform``; one may be drawn several times.

    Args:
        logits: the teacher's [P, V], temperature applied.
        token_ids: int64 [P, k], the exact tokens, which are not part of the tail.
        uniform: float64 [P, S] in [0, 1).

    Returns:
        int64 [P, S]. Where k = V there is no tail and the tokens mean nothing.
    """
    tail = logits.double().scatter(-1, token_ids, -torch.inf).softmax(-1).nan_to_num()
    reached = tail.cumsum(-1)
    total = reached[:, -1:]
    below_total = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reached, below_total, right=True).clamp(max=logits.shape[-1] - 1)
