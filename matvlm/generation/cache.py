"""The memory of a batch in progress: keys and values for a fixed number of tokens, and the mixers' states.

A batch is padded on the left, so all of its sequences end in one column. Every tensor keeps its address from first to
last, as CUDA graphs need. Shapes: B sequences, KV key/value heads, T columns (the capacity), P head width.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from matvlm.models.mixer import MixerState

CROWDED, APART = 1024, 128
"""Heads that are a multiple of CROWDED columns apart meet in the same few channels of a GPU's memory and are read more
slowly; APART columns more, and they are not (``tests/benchmarks/decode_gpu.py --parts columns``)."""


class DecodingCache(Cache):
    """What transformers' decoders take for a cache, with a slot of its own for every layer.

    ``filled`` columns hold tokens; ``end`` [1] and ``first`` [B] (int64, on the device) say the same, and where each
    sequence begins. A pass over a part of the prompt sees the filled columns; while ``stepping``, one token goes to
    column ``end`` and attention gets whole tensors, because what a graph records has to fit every length.
    """

    def __init__(self, mixers: list[bool], batch: int, capacity: int, device: torch.device):
        """``mixers``: of each layer whether it is a mixer."""
        super().__init__(layers=[MixerState() if mixer else KeyValues(self) for mixer in mixers])
        self.capacity, self.filled, self.stepping = capacity, 0, False
        self.end = torch.zeros(1, dtype=torch.long, device=device)
        self.first = torch.zeros(batch, dtype=torch.long, device=device)

    @torch.inference_mode()
    def clear(self) -> None:
        """As new, at the same addresses. Keys and values stay: nobody looks beyond ``filled``."""
        self.filled = 0
        self.end.zero_()
        self.first.zero_()
        for layer in self.layers:
            if isinstance(layer, MixerState):
                layer.reset()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.filled

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.filled + query_length, 0


class KeyValues(CacheLayerMixin):
    """Keys and values of one attention layer, [B, KV, T, P] each."""

    is_sliding = False
    """A layer with a sliding window keeps everything too; attention looks at the window."""

    def __init__(self, cache: DecodingCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # a cycle would keep the memory until it is found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for keys and values like these, [B, KV, any, P]."""
        for name, like in (("keys", key_states), ("values", value_states)):
            batch, heads, _, width = like.shape
            setattr(self, name, like.new_zeros(batch, heads, _columns(self.cache.capacity), width))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put the new ones in their columns; all that attention may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, cache = self.keys, self.values, self.cache
        assert keys is not None
        assert values is not None
        if cache.stepping:
            keys.index_copy_(2, cache.end, key_states)
            values.index_copy_(2, cache.end, value_states)
            return keys, values
        columns = slice(cache.filled, cache.filled + key_states.shape[2])
        keys[:, :, columns], values[:, :, columns] = key_states, value_states
        return keys[:, :, : columns.stop], values[:, :, : columns.stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, 0)

    def get_seq_length(self) -> int:
        return self.cache.filled

    def get_max_length(self) -> int:
        return self.cache.capacity


def _columns(capacity: int) -> int:
    """As many as memory is taken for."""
    crowded = capacity >= 2 * CROWDED and capacity % CROWDED == 0
    return capacity + APART if crowded else capacity
