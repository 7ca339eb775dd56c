"""A decoding step in a few kernels a layer, as a ``Plan`` says. It reads the model's own weights where they lie.

Shapes: B sequences, W hidden size, V words of vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.generation.cache import DecodingCache, KeyValues
from matvlm.generation.plan import Heads, Layer, Plan
from matvlm.kernels.decode import attention, linear, mixer
from matvlm.kernels.decode.linear import Norm
from matvlm.models.mixer import MixerState


class Step:
    """The step of ``plan`` for the sequences of one cache."""

    def __init__(self, model: PreTrainedModel, plan: Plan, cache: DecodingCache):
        """Takes the cache's memory."""
        self.plan, self.cache = plan, cache
        decoder: Any = model.get_decoder()
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        batch, like = cache.first.shape[0], model.get_input_embeddings().weight
        inside = [sum(part.weight.shape[0] for part in layer.inputs) for layer in plan.layers]
        self.normed = like.new_empty(batch, like.shape[1])
        self.projected = like.new_empty(batch, max(inside))
        self.mixed = like.new_empty(batch, max(layer.output.weight.shape[1] for layer in plan.layers))
        self.between = like.new_empty(batch, max(layer.down.weight.shape[1] for layer in plan.layers))
        self.stream = torch.cuda.Stream() if like.is_cuda else None
        self.scratch: dict[tuple[int, int, int], attention.Scratch] = {}
        for layer, slot in zip(plan.layers, cache.layers, strict=True):
            mixing = layer.mixing
            if isinstance(slot, KeyValues):
                assert isinstance(mixing, Heads)
                empty = like.new_empty(batch, mixing.kv_heads, 0, mixing.width)
                slot.lazy_initialization(empty, empty)
                sizes = (mixing.heads, mixing.kv_heads, mixing.width)
                self.scratch.setdefault(sizes, attention.Scratch(batch, *sizes, like.device))
            else:
                assert isinstance(slot, MixerState)
                assert isinstance(mixing, mixer.MixerWeights)
                channels, taps = mixing.conv_weight.shape
                wide = mixing.head_dim
                slot.lazy_initialization(
                    like.new_zeros(batch, channels, taps - 1),
                    torch.zeros(batch, mixing.num_heads, wide, wide, dtype=torch.float32, device=like.device),
                )

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids int64 [B, 1], positions [B, 1] -> logits [B, V]; the cache holds one token more."""
        x = [self.embed(ids)[:, 0]]
        cos, sin = self.rotary(x[0][:, None], positions)
        rotary = (cos[:, 0], sin[:, 0])
        for layer, slot in zip(self.plan.layers, self.cache.layers, strict=True):
            x = self._beside(layer, slot, x, rotary) if layer.mlp_norm is None else self._after(layer, slot, x, rotary)
        head = self.plan.head
        logits = x[0].new_empty(x[0].shape[0], head.weight.shape[0])
        linear.project(self._normed(x, self.plan.norm), [head], logits)
        return logits

    def _beside(self, layer: Layer, slot: Any, x: Sequence[Tensor], rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        """A layer whose MLP and mixing are independent: each keeps the memory busy while the other has to wait.

        ``x`` [B, W] is one tensor, or the sum of two; so is the result.
        """
        mixed, between = self._mixed(layer), self._between(layer)
        sums, added = torch.empty_like(x[0]), torch.empty_like(x[0])
        normed = self._normed(x, layer.norm)
        mlp = self._fork()
        linear.project(normed, layer.inputs, self.projected)  # first, as what follows it has to wait for more
        self._mix(layer.mixing, slot, rotary, mixed)
        linear.add_projected(added, [], mixed, layer.output)
        with mlp:
            linear.project(normed, layer.up, between, layer.activation)
            linear.add_projected(sums, x, between, layer.down)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return [sums, added]

    def _fork(self) -> AbstractContextManager[Any]:
        """Kernels launched inside go to a stream of their own, after what has been launched by now."""
        if self.stream is None:  # Triton's interpreter
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def _after(self, layer: Layer, slot: Any, x: Sequence[Tensor], rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        """A layer whose MLP gets what the mixing gave."""
        mixed, between = self._mixed(layer), self._between(layer)
        out = torch.empty_like(x[0])
        assert layer.mlp_norm is not None
        linear.project(self._normed(x, layer.norm), layer.inputs, self.projected)
        self._mix(layer.mixing, slot, rotary, mixed)
        linear.add_projected(out, x, mixed, layer.output)
        linear.project(self._normed([out], layer.mlp_norm), layer.up, between, layer.activation, gated=True)
        linear.add_projected(out, [out], between, layer.down)
        return [out]

    def _normed(self, x: Sequence[Tensor], norm: Norm) -> Tensor:
        linear.normalize(self.normed, x, norm)
        return self.normed

    def _mixed(self, layer: Layer) -> Tensor:
        return self.mixed[:, : layer.output.weight.shape[1]]

    def _between(self, layer: Layer) -> Tensor:
        return self.between[:, : layer.down.weight.shape[1]]

    def _mix(self, mixing: Heads | mixer.MixerWeights, slot: Any, rotary: tuple[Tensor, Tensor], mixed: Tensor) -> None:
        """From ``projected`` to ``mixed``, by way of the layer's memory."""
        if isinstance(mixing, mixer.MixerWeights):
            mixer.step(self.projected, slot.conv_states[0], slot.recurrent_states[0], mixing, rotary, mixed)
            return
        attention.decode(
            self.projected, slot.keys, slot.values, self.cache.first, self.cache.end, mixing.scale, mixed,
            self.scratch[mixing.heads, mixing.kv_heads, mixing.width], rotary if mixing.rotary else None,
            mixing.norms, mixing.window,
        )  # fmt: skip
