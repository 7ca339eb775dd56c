"""Answers from a model, hybrid or not, as fast as its memory can be read."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.generation.sampling import Sampling, choose
from matvlm.generation.session import Session
from matvlm.generation.text import StopStrings
from matvlm.generation.trial import find_plan
from matvlm.kernels import has_decode_kernels

CHUNK = 4096
"""Tokens of a prompt that go through the decoder at a time: enough to keep a GPU busy, and what they need is small."""
ROUND = 256
"""A cache's capacity is a multiple of it, so that answers of similar length share memory and recorded graphs."""


class Engine:
    """Generates with ``model``, whose weights stay where they are, and which may be used in other ways too."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, chunk: int = CHUNK):
        """``model`` is put into evaluation mode.

        ``tokenizer``, or a processor that has one, is needed for text: to stream, and to stop at strings.
        """
        self.model, self.chunk = model.eval(), chunk
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.session: Session | None = None
        self.plan = find_plan(self.model) if has_decode_kernels(model.device.type) else None

    def open(self, batch: int, capacity: int) -> Session:
        """Room for ``batch`` sequences of ``capacity`` tokens each, prompt and answer together.

        The last session is used again if it has this size and has come to its end, and else given up.
        """
        capacity = -(-capacity // ROUND) * ROUND
        held = self.session
        if held is None or held.busy or (held.batch, held.cache.capacity) != (batch, capacity):
            held = self.session = None  # frees its memory before more is taken
            held = self.session = Session(self.model, batch, capacity, self.chunk, self.plan)
        held.clear()
        return held

    def generate(self, inputs: Mapping[str, Any], sampling: Sampling | None = None) -> list[list[int]]:
        """The answers as token ids, with the end token or those of the stop string if it came to that; no padding.

        Args:
            inputs: what a processor makes of prompts and images, padded on the left.

        Raises:
            ValueError: an empty prompt, padding on the right, or stop strings and no tokenizer.
        """
        sampling = sampling or Sampling()
        answers: list[list[int]] = [[] for _ in inputs["input_ids"]]
        ends = [_End(self, sampling, text=bool(sampling.stop)) for _ in answers]
        live = set(range(len(answers)))
        with closing(self._tokens(inputs, sampling)) as steps:
            for tokens in steps:
                for row in list(live):
                    answers[row].append(tokens[row])
                    if ends[row].reached(tokens[row]):
                        live.remove(row)
                if not live:
                    break
        return answers

    def stream(self, inputs: Mapping[str, Any], sampling: Sampling | None = None) -> Stream:
        """The answer to one prompt as it comes.

        Raises:
            ValueError: several prompts, or no tokenizer.
        """
        if len(inputs["input_ids"]) != 1 or self.tokenizer is None:
            raise ValueError("a stream is of one prompt, and needs the engine's tokenizer")
        return Stream(self, inputs, sampling or Sampling())

    @torch.inference_mode()
    def _tokens(self, inputs: Mapping[str, Any], sampling: Sampling) -> Generator[list[int]]:
        """The next token of each sequence, again and again, whatever it is.

        On a GPU the step after a token is under way when the token is given.
        """
        batch, length = inputs["input_ids"].shape
        session = self.open(batch, length + sampling.max_new_tokens)
        session.busy = True
        try:
            generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
            session.prefill(inputs)
            chosen = copied = None
            for _ in range(sampling.max_new_tokens):
                chosen = choose(session.step(chosen), sampling, generator)
                if copied is not None:
                    yield copied.tokens()
                copied = _Copied(chosen)
            assert copied is not None
            yield copied.tokens()
        finally:
            session.busy = False


class Stream:
    """An iterator of pieces of text, none of which ends in the middle of a character. What is known so far:

    Attributes:
        tokens: ids, with the one that ended the answer.
        prompt_tokens: tokens of the prompt, an image's included.
        first_token_seconds: from the start to the first token; 0.0 before.
    """

    def __init__(self, engine: Engine, inputs: Mapping[str, Any], sampling: Sampling):
        self._engine, self._inputs, self._sampling = engine, inputs, sampling
        self.tokens: list[int] = []
        self.prompt_tokens = int(inputs["input_ids"].shape[1])
        self.first_token_seconds = self._last_seconds = 0.0
        self._pieces = self._stream()

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0.0 until there are two."""
        taken = self._last_seconds - self.first_token_seconds
        return (len(self.tokens) - 1) / taken if taken > 0 else 0.0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _stream(self) -> Generator[str]:
        end = _End(self._engine, self._sampling, text=True)
        started = time.perf_counter()
        with closing(self._engine._tokens(self._inputs, self._sampling)) as tokens:
            for (token,) in tokens:
                self._last_seconds = time.perf_counter() - started
                self.first_token_seconds = self.first_token_seconds or self._last_seconds
                self.tokens.append(token)
                reached = end.reached(token)
                if end.piece:
                    yield end.piece
                if reached:
                    break
        rest = end.rest()
        if rest:
            yield rest


class _End:
    """Whether an answer has come to its end and, if ``text`` is asked for, its text on the way."""

    def __init__(self, engine: Engine, sampling: Sampling, text: bool):
        if sampling.stop and engine.tokenizer is None:
            raise ValueError("stop strings need the engine's tokenizer")
        self.ids = set() if sampling.ignore_eos else _end_ids(engine)
        self.text = StopStrings(engine.tokenizer, sampling.stop) if text else None
        self.piece = ""

    def reached(self, token: int) -> bool:
        """Whether ``token`` is the last one; ``piece`` is the text that it adds."""
        ended = token in self.ids
        self.piece = self.text.push(token) if self.text is not None and not ended else ""
        return ended or (self.text is not None and self.text.found)

    def rest(self) -> str:
        return "" if self.text is None else self.text.rest()


def _end_ids(engine: Engine) -> set[int]:
    """Tokens that end an answer, as ``generate`` of transformers takes them."""
    config = engine.model.generation_config
    found = None if config is None else config.eos_token_id
    return {found} if isinstance(found, int) else set(found or ())


class _Copied:
    """Tokens on their way from the device."""

    def __init__(self, tokens: Tensor):
        self.copy, self.arrived = tokens, None
        if tokens.is_cuda:
            self.copy = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self.copy.copy_(tokens, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def tokens(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        values: list[int] = self.copy.tolist()
        return values
