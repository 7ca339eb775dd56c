"""Attention of one new token for each sequence, over the filled part of preallocated keys and values.

Shapes: B sequences, H query heads, KV key/value heads (H is a multiple of KV), T columns, P head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matvlm.kernels import has_decode_kernels


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    end: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(scale * q k) v`` over the columns ``first`` to ``end``, both included.

    Args:
        query: [B, H, P].
        keys, values: [B, KV, T, P].
        first: int64 [B], the column in which each sequence begins.
        end: int64 [1], the column of the newest token; on the device, so that a recorded graph fits every length.
        window: only the last so many columns, as in attention with a sliding window.
        softcap: scores become ``softcap * tanh(score / softcap)`` (gemma2).

    Returns:
        [B, H, P] in query's dtype.
    """
    if has_decode_kernels(query.device.type):
        from matvlm.kernels.decode import attention as triton_attention

        batch, heads, width = query.shape
        out = query.new_empty(batch, heads * width)
        scratch = triton_attention.Scratch(batch, heads, keys.shape[1], width, query.device)
        triton_attention.decode(
            query.flatten(1), keys, values, first, end, scale, out, scratch, window=window, softcap=softcap, store=False
        )
        return out.unflatten(1, (heads, width))
    if not query.is_cuda:  # there it would wait for the device, and could not be recorded
        last = int(end) + 1
        keys, values = keys[:, :, :last], values[:, :, :last]
    columns = torch.arange(keys.shape[2], device=query.device)
    seen = (columns >= first[:, None]) & (columns <= end)
    if window is not None:
        seen = seen & (columns > end - window)
    return attend(query[:, :, None], keys, values, seen[:, None, None], scale, softcap)[:, :, 0]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of L queries, [B, H, L, P], with a mask that broadcasts to [B, H, L, T]; None: all is seen.

    A row that sees nothing, as that of a padding token, may come out as anything.
    """
    groups = query.shape[1] // keys.shape[1]
    if softcap is None:
        keys, values = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(query.unflatten(1, (-1, groups)), keys[:, :, None].transpose(-1, -2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return torch.matmul(scores.softmax(-1).to(values.dtype), values[:, :, None]).flatten(1, 2)
