"""A vision-language model as lm-eval sees it: greedy answers and log-likelihoods of questions with or without images.

``VLM`` runs any Hugging Face model with a stock ``generate`` and a processor that has a chat template, so teacher and
student go through the very same code. A task's context is plain text with one ``<image>`` per picture; the chat
template is applied here, as a single user turn.

Shapes: B questions, L tokens of a prompt, C tokens of a continuation, N new tokens, V words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from matvlm.evaluate.prefix import chunks, shared_prefix_batches, shares_prefixes
from matvlm.progress import Progress
from matvlm.reporting import Reporter

IMAGE_MARK = "<image>"
DEFAULT_NEW_TOKENS = 256


class Query(NamedTuple):
    """One question: its number among the requests, the rendered prompt and the images that belong into it."""

    number: int
    prompt: str
    images: list[Image.Image]
    image_key: bytes
    """Equal for equal images."""


class Limits(NamedTuple):
    """Where an answer ends: after ``new_tokens`` tokens or before the first of the ``until`` strings."""

    new_tokens: int
    until: tuple[str, ...]


class VLM(LM):
    """lm-eval's view of ``model``.

    ``batch_size`` is in questions. ``model`` is used on the device and in the dtype it has.
    """

    MULTIMODAL = True

    def __init__(
        self, model: Any, processor: Any, batch_size: int, reporter: Reporter | None = None, label: str = "evaluate"
    ):
        super().__init__()
        self.model, self.processor = model.eval(), processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size, self.reporter, self.label = batch_size, reporter, label
        self._device = model.device

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each request, in request order, cut before its stop string.

        Raises:
            ValueError: a task asks for sampling, or a context's image marks do not fit its images.
        """
        queries: dict[Limits, list[Query]] = defaultdict(list)
        for number, request in enumerate(requests):
            queries[_limits(request.args[1])].append(self._query(number, request.args[0], request.args[2:]))
        answers = [""] * len(requests)
        with Progress(len(requests), self.label, "question", self.reporter) as progress:
            for limits, members in queries.items():
                for batch, inputs in self._batches(members):
                    for query, answer in zip(batch, self._generate(inputs, limits), strict=True):
                        answers[query.number] = answer
                    progress.update(len(batch))
        return answers

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each ``(context, continuation)`` log p(continuation | context), and whether greedy decoding would say it.

        Raises:
            ValueError: a context's image marks do not fit its images.
        """
        queries = [self._query(number, r.args[0], r.args[2:]) for number, r in enumerate(requests)]
        scores = [(0.0, True)] * len(requests)
        with Progress(len(requests), self.label, "continuation", self.reporter) as progress:
            for batch in self._by_length(queries):
                continuations = [self._tokenize(requests[query.number].args[1]) for query in batch]
                for query, score in zip(batch, self._score(batch, continuations), strict=True):
                    scores[query.number] = score
                progress.update(len(batch))
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity of whole texts (loglikelihood_rolling) is not supported for VLMs")

    def _query(self, number: int, context: str, multimodal: Sequence[dict[str, Any]]) -> Query:
        images = [image.convert("RGB") for image in (multimodal[0].get("visual") or [])] if multimodal else []
        texts = context.split(IMAGE_MARK)
        if len(texts) != len(images) + 1:
            raise ValueError(f"{len(texts) - 1} {IMAGE_MARK} marks but {len(images)} images in the context {context!r}")
        content: list[dict[str, str]] = []
        for position, text in enumerate(texts):
            content += [{"type": "image"}] * (position > 0)
            content += [{"type": "text", "text": text.strip()}] * bool(text.strip())
        messages = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        key = sha256(repr([image.size for image in images]).encode())
        for image in images:
            key.update(image.tobytes())
        return Query(number, prompt, images, key.digest())

    def _batches(self, queries: list[Query]) -> Iterator[tuple[Sequence[Query], dict[str, Any]]]:
        """Batches of at most ``batch_size`` questions with the keyword arguments that ``generate`` needs for them."""
        if shares_prefixes(self.model, self.processor, queries):
            yield from shared_prefix_batches(self.model, self.tokenizer, self._encode, queries, self.batch_size)
        else:
            for batch in self._by_length(queries):
                yield batch, self._encode(batch)

    def _by_length(self, queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
        """Batches of prompts of about equal length, longest first: a batch that does not fit fails at once."""
        ordered = sorted(queries, key=lambda query: (len(query.images), len(query.prompt)), reverse=True)
        return chunks(ordered, self.batch_size)

    def _encode(self, queries: Sequence[Query], padding_side: str = "left") -> dict[str, Tensor]:
        """The processor's inputs for ``queries``: input_ids and attention_mask int64 [B, L], and image tensors."""
        images = [query.images for query in queries]
        encoded = self.processor(
            text=[query.prompt for query in queries],
            images=images if any(images) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(encoded.to(self.model.device, self.model.dtype))

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, inputs: dict[str, Any], limits: Limits) -> list[str]:
        length = inputs["input_ids"].shape[1]
        stop = [_StopAt(self.tokenizer, limits.until, length)] if limits.until else []
        ids = self.model.generate(
            **inputs,
            max_new_tokens=limits.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList(stop),
        )
        return [_cut(text, limits.until) for text in _decode(self.tokenizer, ids[:, length:])]

    def _score(self, queries: Sequence[Query], continuations: Sequence[list[int]]) -> Iterable[tuple[float, bool]]:
        prompts = self._encode(queries, padding_side="right")
        starts = prompts["attention_mask"].sum(1).tolist()
        inputs = _append(prompts, starts, continuations)
        total = inputs["input_ids"].shape[1]
        keep = total - min(starts) + 1
        logits = self.model(**inputs, use_cache=False, logits_to_keep=keep).logits
        for row, (start, ids) in enumerate(zip(starts, continuations, strict=True)):
            first = start - 1 - (total - keep)
            log_probs = logits[row, first : first + len(ids)].float().log_softmax(-1)  # [C, V]
            wanted = torch.tensor(ids, dtype=torch.long, device=log_probs.device)
            chosen = log_probs.gather(1, wanted[:, None])
            yield float(chosen.sum()), bool((log_probs.argmax(-1) == wanted).all())


class _StopAt(StoppingCriteria):
    """Ends an answer as soon as its text contains one of ``until``."""

    def __init__(self, tokenizer: Any, until: tuple[str, ...], prompt_length: int):
        self.tokenizer, self.until, self.prompt_length = tokenizer, until, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        texts = _decode(self.tokenizer, input_ids[:, self.prompt_length :])
        return torch.tensor([_cut(text, self.until) != text for text in texts], device=input_ids.device)


def _decode(tokenizer: Any, ids: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, until) if at >= 0), default=len(text))]


def _limits(gen_kwargs: dict[str, Any]) -> Limits:
    if gen_kwargs.get("do_sample") or gen_kwargs.get("num_beams", 1) != 1:
        raise ValueError(f"answers are greedy here: remove do_sample and num_beams from generation_kwargs {gen_kwargs}")
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    return Limits(int(gen_kwargs.get("max_gen_toks", DEFAULT_NEW_TOKENS)), tuple(text for text in until if text))


def _append(prompts: dict[str, Tensor], starts: list[int], continuations: Sequence[list[int]]) -> dict[str, Tensor]:
    """Right-padded ``prompts`` with each row's continuation put straight after its own last token.

    Whatever else the processor returns per token counts a continuation as plain text, which is 0 in every family.
    """
    shape = prompts["input_ids"].shape
    longest = max(start + len(ids) for start, ids in zip(starts, continuations, strict=True))
    inputs = {}
    for name, value in prompts.items():
        if value.shape != shape:
            inputs[name] = value
            continue
        inputs[name] = torch.nn.functional.pad(value, (0, max(longest - shape[1], 0)))
        for row, (start, ids) in enumerate(zip(starts, continuations, strict=True)):
            fill = {"input_ids": torch.tensor(ids, dtype=value.dtype), "attention_mask": torch.tensor(1)}
            inputs[name][row, start : start + len(ids)] = fill.get(name, torch.tensor(0)).to(value)
    return inputs
