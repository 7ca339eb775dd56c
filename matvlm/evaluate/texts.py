"""The log-likelihood of whole texts: plain text, without chat template or image, in windows that lm-eval cuts.

Shapes: B windows, L tokens of the longest, P tokens that are predicted, H hidden width, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from matvlm.evaluate.prefix import chunks
from matvlm.teacher import head

LONGEST_WINDOW = 1024
"""Tokens that a model is given at once, as far as it has positions for so many."""
HEAD_POSITIONS = 512
"""Positions whose logits, float32 [512, V], are there at once."""


class Window(NamedTuple):
    """A piece of a text: the last of ``given`` predict ``wanted``, each the token after it."""

    text: int
    given: list[int]
    wanted: list[int]


def log_likelihoods(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> list[float]:
    """log p(text) of each text in nats, its first token predicted from that which starts (or else ends) a text.

    Raises:
        ValueError: the tokenizer has neither of these tokens.
    """
    totals = [0.0] * len(texts)
    windows = [window for number, text in enumerate(texts) for window in _windows(model, tokenizer, number, text)]
    windows.sort(key=lambda window: len(window.given), reverse=True)
    for batch in chunks(windows, batch_size):
        for window, value in zip(batch, _score(model, batch), strict=True):
            totals[window.text] += value
    return totals


def _windows(model: Any, tokenizer: Any, number: int, text: str) -> list[Window]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither a bos_token nor an eos_token, which a text has to start with")
    config = model.config.get_text_config(decoder=True)
    length = min(getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW, LONGEST_WINDOW)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # verbose: it warns of long texts
    pairs = map(make_disjoint_window, get_rolling_token_windows(ids, start, length, context_len=1))
    return [Window(number, [*context, *wanted[:-1]], wanted) for context, wanted in pairs]


def _score(model: Any, windows: Sequence[Window]) -> list[float]:
    """log p of what each window wants. Padding stands behind all that counts, so a causal model needs no mask."""
    rows = [torch.tensor(window.given) for window in windows]
    ids = pad_sequence(rows, batch_first=True, padding_value=windows[0].given[0]).to(model.device)  # [B, L]
    # paligemma sees all of a prompt from everywhere, and only what comes before in an answer: type 1
    types = {"token_type_ids": torch.ones_like(ids)} if model.config.model_type == "paligemma" else {}
    hidden = model.base_model(input_ids=ids, use_cache=False, **types).last_hidden_state  # [B, L, H]
    counts = [len(window.wanted) for window in windows]
    kept = [row[len(w.given) - len(w.wanted) : len(w.given)] for row, w in zip(hidden, windows, strict=True)]
    wanted = torch.tensor([token for window in windows for token in window.wanted], device=hidden.device)
    values = _log_probs(model, torch.cat(kept), wanted).double().cpu()
    return [float(part.sum()) for part in values.split(counts)]


def _log_probs(model: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
    """log p of the tokens ``wanted`` [P] after the last hidden states ``hidden`` [P, H]: float32 [P]."""
    pairs = zip(hidden.split(HEAD_POSITIONS), wanted.split(HEAD_POSITIONS), strict=True)
    return torch.cat([-F.cross_entropy(head(model, some).float(), ids, reduction="none") for some, ids in pairs])
