"""What a model costs to decode with: bytes of its cache, and bytes that one step has to move.

Decoding one token is bound by memory: every weight of decoder and head is read once a step, and of each sequence the
whole cache. So the bytes of a step over the memory bandwidth of a machine are the floor of its time, whatever the code.
All of it runs on models on the ``meta`` device too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from matvlm.models import hybrid
from matvlm.models.mixer import Mamba2Mixer


@dataclass(frozen=True)
class DecodeCost:
    """Bytes of a model that decodes: of the weights that every step reads, and of its cache."""

    weights: int
    """Decoder and head. The embedding table counts only where it is the head too: else a step reads one row of it."""
    per_token: int
    """What every token adds to the cache of its sequence (keys and values)."""
    per_sequence: int
    """What the cache of a sequence holds whatever its length (Mamba-2 states)."""

    def cache(self, tokens: int) -> int:
        """The cache of one sequence."""
        return self.per_sequence + tokens * self.per_token

    def step(self, tokens: int, batch: int = 1) -> int:
        """Bytes moved to decode one token for each of ``batch`` sequences of ``tokens``.

        The weights are read once, the keys and values of all tokens are read and those of one more written, the states
        are read and written. Activations are left out: they stay on the chip.
        """
        return self.weights + batch * ((tokens + 1) * self.per_token + 2 * self.per_sequence)


def decode_cost(model: Any) -> DecodeCost:
    """The costs of ``model``, hybrid or not, in its own dtype."""
    states = {index: state_bytes(mixer) for index, mixer in hybrid.mixers(model).items()}
    per_layer = kv_bytes(model)
    return DecodeCost(
        weights=_decoding_weights(model),
        per_token=sum(size for index, size in enumerate(per_layer) if index not in states),
        per_sequence=sum(states.values()),
    )


@torch.inference_mode()
def kv_bytes(model: Any) -> list[int]:
    """Bytes that each decoder layer has in a cache after one token; of an attention layer, those per token."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with model.device:
        model.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return [tensor_bytes(vars(layer)) for layer in cache.layers]


@torch.inference_mode()
def state_bytes(mixer: Mamba2Mixer) -> int:
    """Bytes of the state of one sequence, whatever its length.

    Measured on a mixer that differs in its hidden size of 1 only, on which the state does not depend.
    """
    dtype = mixer.in_proj.weight.dtype
    options = dataclasses.replace(mixer.options, hidden_size=1, rotary=False)
    cache = DynamicCache()
    Mamba2Mixer(options, layer_idx=0, kernels="torch").to(dtype)(torch.zeros(1, 1, 1, dtype=dtype), None, cache)
    return cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in a transformers cache, keys and values as well as Mamba-2 states."""
    return sum(cache_parts(cache))


def cache_parts(cache: Any) -> tuple[int, int]:
    """The same apart: (keys and values, states)."""
    sizes = [0, 0]
    for layer in cache.layers:
        sizes[isinstance(layer, LinearAttentionCacheLayerMixin)] += tensor_bytes(vars(layer))
    return sizes[0], sizes[1]


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in ``value``: a tensor, or a dictionary of such values; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value.values())) if isinstance(value, dict) else 0


def _decoding_weights(model: Any) -> int:
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    read = {id(p): p for p in model.get_decoder().parameters() if id(p) not in embeddings}
    if head is not None:
        read |= {id(p): p for p in head.parameters()}
    return sum(map(tensor_bytes, read.values()))
