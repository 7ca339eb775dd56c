"""Which token comes next: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-6
"""The lowest temperature to draw at: logits divided by it are still float32 numbers."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is chosen, and where it ends.

    Attributes:
        max_new_tokens: tokens an answer has at most.
        temperature: logits are divided by it before one is drawn; 0 takes the most probable token, whatever the other
            values say.
        top_k: draw among this many most probable tokens, and those as probable as the last of them.
        top_p: draw among the fewest tokens, the most probable ones, whose probabilities sum to this or more.
        seed: of the draws.
        stop: texts that end an answer, and are no part of it.
        ignore_eos: go on after an end token, for measurements.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}: at least 1")
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: 0 for the most probable token, or {COLDEST:g} and more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k}: at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}: above 0 and at most 1, or None for all tokens")
        if isinstance(self.stop, str):
            raise ValueError(f"stop {self.stop!r}: a tuple of texts, not one text")
        if "" in self.stop:
            raise ValueError(f"stop {self.stop!r}: remove the empty text, which every answer starts with")


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """The next token of each row, int64 [B], for its ``logits`` [B, V]. Nothing waits for the device.

    Args:
        generator: of the draws, on the logits' device; None for torch's own there.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = restrict(logits, sampling).softmax(-1)
    # Of exponential variables, that with rate p is the first of all with probability p. A zero would make 0 / 0.
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / times.clamp_min_(torch.finfo(times.dtype).tiny)).argmax(-1)


def restrict(logits: Tensor, sampling: Sampling) -> Tensor:
    """``logits`` [B, V] as float32 over the temperature, those of tokens that may not be drawn minus infinity."""
    logits = logits.float() / sampling.temperature
    if sampling.top_k is not None:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, tokens = logits.sort()
        # The least probable tokens that the rest can do without; never the last, the most probable one.
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(torch.empty_like(dropped).scatter_(1, tokens, dropped), -math.inf)
    return logits
