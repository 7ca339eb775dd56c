"""The attention that transformers' decoders compute while an engine runs them.

transformers looks a layer's attention up by a name in the model's configuration. Inside ``engaged`` that name is ours:
a pass over a part of the prompt runs PyTorch's attention, without a mask wherever a causal kernel does; a step for one
new token runs ``decode_attention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from matvlm.generation.cache import DecodingCache
from matvlm.kernels.attention import attend, decode_attention

NAME = "matvlm"

_running: ContextVar[DecodingCache] = ContextVar("running")


@contextmanager
def engaged(model: PreTrainedModel, cache: DecodingCache) -> Iterator[None]:
    """Inside, the text decoder of ``model`` computes attention as this file says, with ``cache``."""
    config: Any = model.config.get_text_config(decoder=True)
    before, config._attn_implementation = config._attn_implementation, NAME
    token = _running.set(cache)
    try:
        yield
    finally:
        _running.reset(token)
        config._attn_implementation = before


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """What transformers asks for: query [B, H, L, P], key and value [B, KV, T, P] -> [B, L, H, P]."""
    cache = _running.get()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache.stepping:
        found = decode_attention(query[:, :, 0], key, value, cache.first, cache.end, scale, sliding_window, softcap)
        return found[:, None], None
    length, columns = query.shape[2], key.shape[2]
    if attention_mask is None and length > 1 and softcap is not None:
        attention_mask = torch.ones(length, columns, dtype=torch.bool, device=query.device).tril(columns - length)
        attention_mask = attention_mask[None, None]
    if attention_mask is None and length > 1:
        return _causal(query, key, value, scale).transpose(1, 2), None
    return attend(query, key, value, attention_mask, scale, softcap).transpose(1, 2), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The L queries are the last L columns; both cases have a kernel that never makes a mask."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    bias: Any = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _mask(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Tensor | None:
    """A mask of booleans [B, 1, L, T] where one is needed."""
    if _running.get().stepping:
        return None
    plain = allow_is_causal_skip and (local_size is None or kv_length <= local_size)
    if plain and attention_mask is None:
        return None
    mask: Tensor | None = sdpa_mask(
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **others,
    )
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
