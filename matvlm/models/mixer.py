"""The Mamba-2 mixer that takes the place of a decoder layer's ``self_attn``.

Its widths are those of the attention it replaces: a head's width P is also its state width N, x and B have the
key/value heads (KV of them), C and the output have the query heads (H), and under grouped-query attention x and B are
repeated from the former to the latter (arXiv 2503.13440). Letters: B batch, L tokens, W hidden size.

It is called as attention is in transformers 5 and answers with ``(out, None)``. Its running state lives in the model's
own cache, so ``generate`` works unchanged with dynamic and static caches, left padding, beam search, chunked prefill.
Rows that hold several samples are told by ``seq_idx``, which transformers' own Mamba-2 models take too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from matvlm.kernels.conv import causal_conv1d
from matvlm.kernels.ssd import ssd_scan, ssd_step


@dataclass(frozen=True)
class MixerOptions:
    """Sizes and form of one mixer; saved in the model's config.json."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    in_bias: bool
    out_bias: bool
    conv_kernel: int = 4
    conv_silu: bool = True
    """SiLU after the convolution, as in Mamba-2; without it the convolution is linear."""
    rotary: bool = False
    """Rotate C and B by the layer's position embeddings, as attention rotates q and k."""
    scale_input_by_dt: bool = True
    """As in Mamba-2; without it the step size sets the decay only (x is divided by softplus(dt) before the scan)."""
    qk_norm_eps: float | None = None
    """RMS norm of each head of C and B before they are rotated, as in qwen3 and gemma3; None: no norm."""
    norm_eps: float = 1e-5
    chunk_size: int = 64
    """Most tokens per chunk of the scan; changes speed, not results."""


class MixerState(LinearAttentionLayer):
    """The cache slot of one mixer: convolution inputs [B, D, K - 1] and SSD state [B, H, P, N] in float32.

    Adds what the base class lacks next to an attention layer's slot.
    """

    is_sliding = None
    """Neither: transformers 5.17 sizes masks by the first layer with True and the first one with False."""

    def store(self, conv_state: Tensor, ssd_state: Tensor) -> None:
        """Copy the new states in; the slot's tensors keep their addresses, as CUDA graphs need."""
        if not self.is_conv_states_initialized[0]:
            self.lazy_initialization(conv_states=conv_state, recurrent_states=ssd_state)
        self.has_previous_state[0] = True
        for stored, new in ((self.conv_states[0], conv_state), (self.recurrent_states[0], ssd_state)):
            assert stored is not None
            stored.copy_(new)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("a Mamba-2 state cannot forget its last tokens: switch assisted decoding off")

    def _select(self, choose: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, tensor in states.items():
                if tensor is not None:
                    states[index] = choose(tensor)


class Mamba2Mixer(nn.Module):
    """Mamba-2 in the shape of an attention: ``out_proj(norm(SSD(conv(x, B, C), dt) * silu(z)))``, no dropout.

    Parameters: ``in_proj`` with the outputs [z HP, x KV P, B KV N, C HN, dt H], ``conv_weight`` [D, K] and
    ``conv_bias`` [D] over the D channels of (x, B, C), ``dt_bias``, ``A_log`` and ``D`` [H], ``norm_weight`` [HP] (each
    head is normalised on its own), ``B_norm_weight`` and ``C_norm_weight`` [N] (None without ``qk_norm_eps``),
    ``out_proj``. All are trainable.
    """

    def __init__(
        self, options: MixerOptions, layer_idx: int, kernels: str = "auto", generator: torch.Generator | None = None
    ):
        super().__init__()
        self.options, self.layer_idx, self.kernels = options, layer_idx, kernels
        inner, kv = options.num_heads * options.head_dim, options.num_kv_heads * options.head_dim
        self.gate_size, self.conv_size = inner, 2 * kv + inner
        self.split_sizes = [kv, kv, inner]
        in_size = self.gate_size + self.conv_size + options.num_heads
        self.in_proj = nn.Linear(options.hidden_size, in_size, bias=options.in_bias)
        self.conv_weight = nn.Parameter(torch.empty(self.conv_size, options.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_size))
        self.dt_bias = nn.Parameter(torch.empty(options.num_heads))
        self.A_log = nn.Parameter(torch.empty(options.num_heads))
        self.D = nn.Parameter(torch.empty(options.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(inner))
        has_norms = options.qk_norm_eps is not None
        self.B_norm_weight = nn.Parameter(torch.empty(options.head_dim)) if has_norms else None
        self.C_norm_weight = nn.Parameter(torch.empty(options.head_dim)) if has_norms else None
        self.out_proj = nn.Linear(inner, options.hidden_size, bias=options.out_bias)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Mamba-2's own random start: dt log-uniform in [0.001, 0.1], A uniform in [-16, -1], D and norm 1."""
        for parameters, fan_in in (
            ([*self.in_proj.parameters()], self.options.hidden_size),
            ([self.conv_weight, self.conv_bias], self.options.conv_kernel),
            ([*self.out_proj.parameters()], self.gate_size),
        ):
            for parameter in parameters:
                parameter.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
        self.dt_bias.copy_(inverse_softplus(self.dt_bias.exp()))
        self.A_log.uniform_(1.0, 16.0, generator=generator).log_()
        self.D.fill_(1.0)
        for weight in (self.norm_weight, self.B_norm_weight, self.C_norm_weight):
            if weight is not None:
                weight.fill_(1.0)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        seq_idx: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        """What attention does in its place.

        Args:
            hidden_states: [B, L, W].
            attention_mask: the model's causal mask [B, 1, L, T] (bool or additive), or a padding mask [B, T]; only
                which tokens are padding is read from it. None: no padding.
            past_key_values: the model's cache; the mixer puts its own slot there.
            position_embeddings: (cos, sin), [B or 1, L, R] each; needed with ``rotary``. R <= P: the rest of a head
                passes unrotated.
            seq_idx: which sample of a packed row each token is of, int32 [B, L], 0 first and never falling. Nothing
                passes from one to the next; padding is a sample of its own, and ``attention_mask`` is not read.

        Returns:
            ([B, L, W], None).

        Raises:
            ValueError: ``seq_idx`` and a cache; with one, transformers' masks do not keep samples apart.
        """
        if seq_idx is not None and past_key_values is not None:
            raise ValueError("packed rows (seq_idx) cannot go through a cache: pass use_cache=False")
        length = hidden_states.shape[1]
        slot = None if past_key_values is None else claim_slot(past_key_values, self.layer_idx)
        keep = None if seq_idx is not None else _real_tokens(attention_mask, length, past_key_values, self.layer_idx)
        conv_state = ssd_state = None
        if slot is not None and slot.has_previous_state[0]:
            conv_state, ssd_state = slot.conv_states[0], slot.recurrent_states[0]

        z, xBC, dt = self.in_proj(hidden_states).split([self.gate_size, self.conv_size, self.options.num_heads], dim=-1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        # in_proj and the convolution have biases, so padding has to be silenced after each of them.
        padding = None if keep is None else ~keep[..., None]
        if padding is not None:
            xBC, dt = xBC.masked_fill(padding, 0.0), dt.masked_fill(padding, 0.0)
        xBC, conv_state = causal_conv1d(
            xBC, self.conv_weight, self.conv_bias, conv_state, self.options.conv_silu, self.kernels, seq_idx
        )
        x, BC = xBC.split([self.split_sizes[0], sum(self.split_sizes[1:])], dim=-1)
        if padding is not None and not self.options.scale_input_by_dt:  # else dt = 0 has silenced x
            x = x.masked_fill(padding, 0.0)
        y, ssd_state = self._scan(x, BC, dt, ssd_state, position_embeddings, seq_idx)
        if slot is not None:
            slot.store(conv_state, ssd_state)
        return self.out_proj(self._gated_norm(y, z)), None

    def _scan(
        self,
        x: Tensor,
        BC: Tensor,
        dt: Tensor,
        state: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """x [B, L, KV P], (B, C) [B, L, KV N + HN], dt [B, L, H] -> y [B, L, H, P] and the new state [B, H, P, N]."""
        options = self.options
        x, BC = x.unflatten(-1, (-1, options.head_dim)), BC.unflatten(-1, (-1, options.head_dim))
        if options.qk_norm_eps is not None:
            BC = self._head_norms(BC, options.qk_norm_eps)
        if options.rotary:
            if position_embeddings is None:
                raise ValueError(f"layer {self.layer_idx}: a mixer with rotary needs position_embeddings=(cos, sin)")
            BC = rotate(BC, *position_embeddings)
        B, C = BC.split([options.num_kv_heads, options.num_heads], dim=2)
        if options.num_kv_heads < options.num_heads:
            x = x.repeat_interleave(options.num_heads // options.num_kv_heads, dim=2)
        A = -torch.exp(self.A_log.float())
        if x.shape[1] == 1 and state is not None:
            y, state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, state, options.scale_input_by_dt)
            return y[:, None], state
        scale = options.scale_input_by_dt
        return ssd_scan(x, dt, A, B, C, self.D, state, options.chunk_size, scale, self.kernels, seq_idx)

    def _head_norms(self, BC: Tensor, eps: float) -> Tensor:
        """RMS norm of each head of (B, C), [B, L, KV + H, N]."""
        assert self.B_norm_weight is not None
        assert self.C_norm_weight is not None
        weights = [self.B_norm_weight.expand(self.options.num_kv_heads, -1)]
        weights.append(self.C_norm_weight.expand(self.options.num_heads, -1))
        normed = F.rms_norm(BC.float(), BC.shape[-1:], eps=eps) * torch.cat(weights).float()
        return normed.to(BC.dtype)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMS norm of each head of ``y * silu(z)``: [B, L, H, P], [B, L, H P] -> [B, L, H P] in z's dtype."""
        gated = y.float() * F.silu(z.float()).unflatten(-1, (-1, self.options.head_dim))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.options.norm_eps).flatten(-2)
        return (normed * self.norm_weight.float()).to(z.dtype)

    def extra_repr(self) -> str:
        return f"layer_idx={self.layer_idx}, {self.options}"


def inverse_softplus(value: Tensor) -> Tensor:
    """v with ``softplus(v) = value``, for value > 0."""
    return value + torch.log(-torch.expm1(-value))


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of the first R channels of each head, halves paired as in phi and llama.

    Args:
        heads: [B, L, H, P].
        cos, sin: [B or 1, L, R]; of positions with several axes (mrope) what the model's rotary module made of them.

    Raises:
        ValueError: cos has another number of axes, as where an attention merges those of mrope itself.
    """
    if cos.dim() != 3:
        raise ValueError(f"position_embeddings of shape {list(cos.shape)}, expected [batch, tokens, width]")
    half = cos.shape[-1] // 2
    (cos1, cos2), (sin1, sin2) = cos[:, :, None].chunk(2, dim=-1), sin[:, :, None].chunk(2, dim=-1)
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos1 - second * sin1, second * cos2 + first * sin2, rest], dim=-1)


def claim_slot(cache: Cache, layer_idx: int) -> MixerState:
    """The mixer's slot in ``cache``, put there on first use in place of the attention slot the cache came with."""
    layers = cache.layers
    while len(layers) <= layer_idx:
        layers.append(DynamicLayer())
    slot = layers[layer_idx]
    if not isinstance(slot, MixerState):
        slot = layers[layer_idx] = MixerState()
    return slot


def _real_tokens(mask: Any, length: int, cache: Cache | None, layer_idx: int) -> Tensor | None:
    """Which of the current tokens are not padding, bool [B, L], or None if none is.

    A mask, causal or not, with a sliding window or without, lets a token see itself unless it is padding. The current
    tokens' own columns are the last L, except in a static cache that is not full yet: there free columns follow.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"attention masks of type {type(mask).__name__}: use eager, sdpa or flash attention")
    first: int | Tensor = mask.shape[-1] - length
    if cache is not None and mask.shape[-1] > length and cache.is_compileable:
        before = _tokens_before(cache, layer_idx, length)
        first = before.clamp(max=first) if isinstance(before, Tensor) else min(before, mask.shape[-1] - length)
    rows = torch.arange(length, device=mask.device)
    if mask.dim() == 2:
        return mask[:, first + rows].bool()
    own = mask[:, 0, rows, first + rows]
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _tokens_before(cache: Cache, layer_idx: int, length: int) -> int | Tensor:
    """Tokens in ``cache`` before the current ones; attention layers below have counted those already.

    A scalar tensor where the cache counts in one, so that no device has to be waited for and graphs stay whole.
    """
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, CacheLayerMixin) and not isinstance(layer, LinearAttentionCacheLayerMixin):
            counted: int | Tensor = layer.get_seq_length()
            return counted - length if index < layer_idx else counted
    raise ValueError("the cache has no attention layer, so its length is unknown: keep at least one attention layer")
