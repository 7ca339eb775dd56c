"""Where an answer ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria

from matvlm.generation.text import cut

DEFAULT_NEW_TOKENS = 256


class Limits(NamedTuple):
    """Where an answer ends: after ``new_tokens`` tokens or before the first of the ``until`` strings."""

    new_tokens: int
    until: tuple[str, ...]


def limits_of(gen_kwargs: dict[str, Any]) -> Limits:
    """What a task's ``generation_kwargs`` say.

    Raises:
        ValueError: they ask for sampling or for beams.
    """
    if gen_kwargs.get("do_sample") or gen_kwargs.get("num_beams", 1) != 1:
        raise ValueError(f"answers are greedy here: remove do_sample and num_beams from generation_kwargs {gen_kwargs}")
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    return Limits(int(gen_kwargs.get("max_gen_toks", DEFAULT_NEW_TOKENS)), tuple(text for text in until if text))


class StopAt(StoppingCriteria):
    """Ends an answer as soon as its text contains one of ``until``."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], prompt_length: int):
        self.tokenizer, self.until, self.prompt_length = tokenizer, until, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        texts = decode(self.tokenizer, input_ids[:, self.prompt_length :])
        return torch.tensor([cut(text, self.until) != text for text in texts], device=input_ids.device)


def decode(tokenizer: Any, ids: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts
