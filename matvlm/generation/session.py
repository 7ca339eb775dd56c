"""A batch in progress: its cache, its prompt, and the step that makes the next logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.generation.attention import engaged
from matvlm.generation.cache import DecodingCache
from matvlm.generation.prompt import read_prompt
from matvlm.models import hybrid
from matvlm.models.families import BIDIRECTIONAL
from matvlm.recording import record, warm_up

if TYPE_CHECKING:
    from matvlm.generation.plan import Plan

MOST_ROWS = 64
"""Sequences that the kernels of a plan are made for; of more, the products are bound by arithmetic."""


class Session:
    """``batch`` sequences of at most ``capacity`` tokens. Shapes: B sequences, L tokens, V words of vocabulary.

    On a GPU the step is recorded as a CUDA graph when the first prompt comes, and replayed.
    """

    def __init__(self, model: PreTrainedModel, batch: int, capacity: int, chunk: int, plan: Plan | None = None):
        """Prompts go through the decoder ``chunk`` tokens at a time, those of all sequences together.

        ``plan``: of a step in a few kernels a layer, for a GPU; None: the model's own modules compute it.
        """
        self.model, self.batch, self.chunk = model, batch, chunk
        device = model.device
        mixers = hybrid.mixers(model)
        self.cache = DecodingCache(
            [index in mixers for index in range(len(hybrid.decoder_layers(model)))], batch, capacity, device
        )
        self.fused: Callable[[Tensor, Tensor], Tensor] | None = None
        if plan is not None and batch <= MOST_ROWS:
            from matvlm.generation.fused import Step

            self.fused = Step(model, plan, self.cache)
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions: Tensor | None = None
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.busy = False
        """Somebody is between two of its tokens."""
        self.answered = False
        """The logits are there before the first step."""

    def clear(self) -> None:
        """Forget the sequences, keep the memory and the recorded step."""
        self.cache.clear()
        self.answered = False

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Any]) -> None:
        """All tokens of the prompt but the last, which is the first step's.

        Where tokens of a prompt attend to later ones (paligemma, gemma3), all of them, and the first step is done too.

        Args:
            inputs: what a processor makes of prompts and images, padded on the left; input_ids int64 [B, L].

        Raises:
            ValueError: no tokens, padding that is not on the left, another number of sequences than the session has, or
                a prompt that does not fit.
        """
        batch, length = inputs["input_ids"].shape
        if not length:
            raise ValueError("input_ids: an empty prompt; there has to be one token at least")
        if batch != self.batch or length > self.cache.capacity:
            raise ValueError(f"{batch} x {length} tokens do not fit {self.batch} x {self.cache.capacity}")
        with engaged(self.model, self.cache):
            prompt = read_prompt(self.model, inputs, self.cache)
            self._start_at(prompt.positions[..., -1:])
            self.cache.first.copy_(prompt.first)
            if self.model.config.model_type in BIDIRECTIONAL:
                self.cache.end.fill_(length - 1)
                self._keep(self._forward(**{**inputs, "position_ids": prompt.positions}))
                self.cache.filled, self.answered = length, True
                return
            columns = max(1, self.chunk // batch)
            for start in range(0, length - 1, columns):
                stop = min(start + columns, length - 1)
                self.model.get_decoder()(**prompt.part(start, stop), past_key_values=self.cache, use_cache=True)
                self.cache.filled = stop
        self.cache.end.fill_(length - 1)
        self.ids.copy_(prompt.ids[:, -1:])

    @torch.inference_mode()
    def step(self, ids: Tensor | None = None) -> Tensor:
        """One token more for every sequence; on a GPU nothing waits for it.

        Args:
            ids: int64 [B], what was chosen from the last logits; None: the prompt's last tokens.

        Returns:
            [B, V], in the model's dtype. The next step writes to the same memory.

        Raises:
            ValueError: the sequences are as long as the session has room for.
        """
        if self.cache.filled >= self.cache.capacity:
            raise ValueError(f"the session has room for {self.cache.capacity} tokens a sequence, and they are used up")
        if ids is None and self.answered:
            self.answered = False
            assert self.logits is not None
            return self.logits
        if ids is not None:
            self.ids.copy_(ids[:, None])
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        self.cache.filled += 1
        assert self.logits is not None
        return self.logits

    def _start_at(self, positions: Tensor) -> None:
        """The step's positions; recorded now, while nothing is in the cache, if they have another form than before."""
        if self.positions is None or self.positions.shape != positions.shape:
            self.positions, self.graph = positions.clone(), None
            if positions.is_cuda:
                self._record()
        self.positions.copy_(positions)

    def compute(self) -> None:
        """From ``ids`` to ``logits``; then the cache and the positions are one token further."""
        assert self.positions is not None
        if self.fused is not None:
            self._keep(self.fused(self.ids, self.positions))
            return
        self.cache.stepping = True
        with engaged(self.model, self.cache):
            made = self._forward(input_ids=self.ids, position_ids=self.positions)
        self.cache.stepping = False
        self._keep(made)

    def _forward(self, **inputs: Any) -> Tensor:
        """The logits of the last token, [B, V]."""
        logits: Tensor = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def _keep(self, logits: Tensor) -> None:
        """``logits`` of a token that everything has seen, at the address that stays."""
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)
        assert self.positions is not None
        self.positions += 1
        self.cache.end += 1

    def _record(self) -> None:
        """Make ``compute`` one CUDA graph instead of thousands of launches."""
        warm_up(self.compute)
        self.graph = record(self.compute)
        self.cache.clear()
