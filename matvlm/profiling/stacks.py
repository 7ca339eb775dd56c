"""What runs a model while it is measured: transformers' ``generate()`` and our engine. B sequences of L tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache, StoppingCriteria
from transformers.cache_utils import StaticLayer

from matvlm.config import StackName
from matvlm.costs import cache_parts
from matvlm.generation import Engine


class Timing(NamedTuple):
    """One prompt and its answer."""

    prefill_seconds: float
    first_token_seconds: float
    decode_seconds: float
    """From the first token to the last."""
    timed_seconds: float
    """All that the clock ran for."""
    kv_bytes: int
    state_bytes: int


class Stack(Protocol):
    """A model and what runs it."""

    def run(self, ids: Tensor, new_tokens: int, end_after: int) -> Timing:
        """Answer the prompt ``ids``, int64 [B, L], with room for ``new_tokens``, but only as far as ``end_after``."""

    def forget(self) -> None:
        """Let go of what was kept from one run to the next."""


def make(name: StackName, model: PreTrainedModel) -> Stack:
    return MatvlmEngine(model) if name == "engine" else Transformers(model, static=name == "hf_static")


def now(device: torch.device) -> float:
    """Seconds, after everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Transformers:
    """``generate()`` with a dynamic or a static cache."""

    def __init__(self, model: PreTrainedModel, static: bool):
        self.model, self.static = model, static

    def run(self, ids: Tensor, new_tokens: int, end_after: int) -> Timing:
        prefill = self._prefill(ids, new_tokens)
        watch = _FirstToken(ids, end_after)
        options = {"cache_implementation": "static"} if self.static else {}
        vars(self.model).pop("_previous_max_cache_length", None)  # else a static cache is as long as the longest before
        with _without_end(self.model):
            started = now(ids.device)
            made: Any = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                stopping_criteria=[watch],
                return_dict_in_generate=True,
                **options,
            )
            ended = now(ids.device)
        timed, sizes = prefill + ended - started, cache_parts(made.past_key_values)
        if self.static:
            _free(made.past_key_values)
        return Timing(prefill, watch.time - started, ended - watch.time, timed, *sizes)

    @torch.no_grad()
    def _prefill(self, ids: Tensor, new_tokens: int) -> float:
        config = self.model.config.get_text_config(decoder=True)
        cache: Any
        if self.static:
            cache = StaticCache(config=config, max_cache_len=ids.shape[1] + new_tokens)
        else:
            cache = DynamicCache(config=config)
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        started = now(ids.device)
        head(decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:])
        return now(ids.device) - started

    def forget(self) -> None:
        """The compiled call."""
        if self.static:
            vars(self.model).pop("_compiled_call", None)


def _free(cache: StaticCache) -> None:
    """Give its memory back; compiled code holds on to the tensors until other code takes its place."""
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values) if isinstance(layer, StaticLayer) else ():
            tensor.untyped_storage().resize_(0)


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there, and ends generation after ``end_after`` tokens."""

    def __init__(self, ids: Tensor, end_after: int):
        self.first, self.last = ids.shape[1] + 1, ids.shape[1] + end_after
        self.going = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.time = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] == self.first:
            self.time = now(input_ids.device)
        return self.going if input_ids.shape[1] < self.last else ~self.going


@contextmanager
def _without_end(model: PreTrainedModel) -> Iterator[None]:
    """No end token, and none of the settings that a model brings along: nothing that would cost work."""
    before = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = before


class MatvlmEngine:
    """Our engine's session: open and recorded before the clock starts, closed after it stops."""

    def __init__(self, model: PreTrainedModel):
        self.engine = Engine(model)

    def run(self, ids: Tensor, new_tokens: int, end_after: int) -> Timing:
        try:
            return self._run(ids, new_tokens, end_after)
        finally:
            self.forget()

    @torch.inference_mode()
    def _run(self, ids: Tensor, new_tokens: int, end_after: int) -> Timing:
        size = ids.shape[0], ids.shape[1] + new_tokens
        session = self.engine.open(*size)
        session.prefill({"input_ids": ids[:, :1]})  # takes the memory, and on a GPU records the step
        session.step()
        session = self.engine.open(*size)  # the same one, empty again
        started = now(ids.device)
        session.prefill({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        prefilled = now(ids.device)
        token = session.step().argmax(-1)
        first = now(ids.device)
        for _ in range(end_after - 1):
            token = session.step(token).argmax(-1)
        ended = now(ids.device)
        sizes = cache_parts(session.cache)
        return Timing(prefilled - started, first - started, ended - first, ended - started, *sizes)

    def forget(self) -> None:
        self.engine.session = None
