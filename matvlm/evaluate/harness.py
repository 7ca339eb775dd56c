"""A vision-language model as lm-eval sees it: greedy answers and log-likelihoods of questions, and of whole texts.

``VLM`` runs any Hugging Face model with a stock ``generate`` and a processor that has a chat template, so teacher and
student go through the very same code. A question's context is plain text with one ``<image>`` per picture, if it has
any; the chat template is applied here, as a single user turn. A text is taken as it is.

Shapes: B questions, L tokens of a prompt, C tokens of a continuation, N new tokens, V words.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteriaList

from matvlm.evaluate import pictures
from matvlm.evaluate.answers import Answers, key_of
from matvlm.evaluate.prefix import chunks, shared_prefix_batches, shares_prefixes
from matvlm.evaluate.stopping import Limits, StopAt, decode, limits_of
from matvlm.evaluate.texts import log_likelihoods
from matvlm.generation.text import cut
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.world import World

logger = logging.getLogger(__name__)

IMAGE_MARK = "<image>"
BLANK_SIZE = (224, 224)


class Query(NamedTuple):
    """One question, or text: its number among the requests, the rendered prompt and the images that belong into it."""

    number: int
    prompt: str
    images: list[Image.Image]
    image_key: str
    """Equal for equal images."""
    key: str
    """Equal for equal questions."""


Asked = Iterator[tuple[Sequence[Query], Iterable[Any]]]
"""Batches and their answers."""


class VLM(LM):
    """lm-eval's view of ``model``.

    Args:
        model, processor: used on the device and in the dtype that the model has.
        batch_size: in questions. Answers do not depend on it.
        world: the processes that share the questions; lm-eval gives each its own.
        answers: what was answered before, and where to keep what is answered now. With it, images are let go when all
            is answered: lm-eval's records have their sha256 in place of them.
    """

    MULTIMODAL = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int,
        reporter: Reporter | None = None,
        label: str = "evaluate",
        world: World | None = None,
        answers: Answers | None = None,
    ):
        super().__init__()
        self.model, self.processor = model.eval(), processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size, self.reporter, self.label = batch_size, reporter, label
        self.world, self.answers = world or World(), answers
        self._device, self._rank, self._world_size = model.device, self.world.rank, self.world.size
        self.unreadable: dict[str, str] = {}
        """Questions whose image cannot be decoded, and why; their answer is empty."""
        self._blank: dict[str, str] = {}

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to each request, in request order, cut before its stop string.

        Raises:
            ValueError: a task asks for sampling, or a context's image marks do not fit its images.
        """

        def ask(queries: Sequence[Query]) -> Asked:
            by_limits: dict[Limits, list[Query]] = defaultdict(list)
            for query in queries:
                by_limits[limits_of(requests[query.number].args[1])].append(query)
            for limits, members in by_limits.items():
                for batch, inputs in self._batches(members):
                    yield batch, self._generate(inputs, limits)

        return self._answer("generate_until", requests, ask, "question", unreadable="")

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each ``(context, continuation)`` log p(continuation | context), and whether greedy decoding would say it.

        Raises:
            ValueError: a context's image marks do not fit its images.
        """

        def ask(queries: Sequence[Query]) -> Asked:
            for batch in self._by_length(queries):
                yield batch, self._score(batch, [self._tokenize(requests[query.number].args[1]) for query in batch])

        scores = self._answer("loglikelihood", requests, ask, "continuation", unreadable=(float("-inf"), False))
        return [(value, is_greedy) for value, is_greedy in scores]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each text log p(text), in nats, without chat template or images.

        Raises:
            ValueError: the tokenizer has no token that a text can start with.
        """

        def ask(queries: Sequence[Query]) -> Asked:
            for batch in self._by_length(queries):
                texts = [query.prompt for query in batch]
                yield batch, log_likelihoods(self.model, self.tokenizer, texts, self.batch_size)

        return self._answer("loglikelihood_rolling", requests, ask, "text")

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A small ``tensor`` of every process, flat, one after the other."""
        return torch.tensor(self.world.gather(tensor.tolist())).flatten()

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """``obj`` of every process, in process ``dst``."""
        gathered = self.world.gather(obj)
        return _with_all_metrics(gathered) if self.world.rank == dst else None

    def barrier(self) -> None:
        self.world.wait()

    def _answer(
        self,
        kind: str,
        requests: list[Instance],
        ask: Callable[[Sequence[Query]], Asked],
        unit: str,
        unreadable: Any = None,
    ) -> list[Any]:
        """An answer to each request, kept ones first, the others by ``ask``, each kept as soon as it is there.

        Equal requests are asked once: POPE's splits share questions, and lm-eval repeats the last one in a process that
        has fewer.
        """
        queries = [self._query(number, kind, request) for number, request in enumerate(requests)]
        results: list[Any] = [self.answers.get(query.key) if self.answers else None for query in queries]
        alike: dict[str, list[int]] = defaultdict(list)
        for query in queries:
            if results[query.number] is None:
                alike[query.key].append(query.number)
        missing = [queries[numbers[0]] for numbers in alike.values()]
        done = len(requests) - sum(map(len, alike.values()))
        with Progress(len(requests), self.label, unit, self.reporter, initial=done) as progress:
            for batch, given in ask(missing):
                found = {}
                for query, answer in zip(batch, given, strict=True):
                    readable = query.image_key not in self._blank
                    if readable:
                        found[query.key] = answer
                    for number in alike[query.key]:
                        results[number] = answer if readable else unreadable
                        self._note(kind, requests[number], query, results[number])
                if self.answers:
                    self.answers.add(found)
                progress.update(sum(len(alike[query.key]) for query in batch))
        if self.answers:
            _let_go(requests)
        return results

    def _note(self, kind: str, request: Instance, query: Query, answer: Any) -> None:
        """Tell lm-eval's cache, or the world if the image of ``query`` cannot be read."""
        if query.image_key not in self._blank:
            self.cache_hook.add_partial(kind, request.args, answer)
            return
        id = str((request.doc or {}).get("id", request.doc_id))
        self.unreadable[id] = self._blank[query.image_key]
        logger.warning("%s: question %s is not answered: %s", self.label, id, self.unreadable[id])

    def _query(self, number: int, kind: str, request: Instance) -> Query:
        if len(request.args) == 1:
            (text,) = request.args
            return Query(number, text, [], "", key_of(kind, text))
        context, argument, *multimodal = request.args
        images = list(multimodal[0].get("visual") or []) if multimodal else []
        texts = context.split(IMAGE_MARK)
        if len(texts) != len(images) + 1:
            raise ValueError(f"{len(texts) - 1} {IMAGE_MARK} marks but {len(images)} images in the context {context!r}")
        content: list[dict[str, str]] = []
        for position, text in enumerate(texts):
            content += [{"type": "image"}] * (position > 0)
            content += [{"type": "text", "text": text.strip()}] * bool(text.strip())
        messages = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        image_key = " ".join(map(pictures.key, images))
        return Query(number, prompt, images, image_key, key_of(kind, context, argument, image_key))

    def _batches(self, queries: list[Query]) -> Iterator[tuple[Sequence[Query], dict[str, Any]]]:
        """Batches of at most ``batch_size`` questions with the keyword arguments that ``generate`` needs for them."""
        if shares_prefixes(self.model, self.processor, queries):
            yield from shared_prefix_batches(self.model, self.tokenizer, self._encode, queries, self.batch_size)
        else:
            for batch in self._by_length(queries):
                yield batch, self._encode(batch)

    def _by_length(self, queries: Sequence[Query]) -> Iterator[Sequence[Query]]:
        """Batches of prompts with as many images each and about equal length, longest first: what does not fit fails
        at once."""
        ordered = sorted(queries, key=lambda query: (len(query.images), len(query.prompt)), reverse=True)
        for _, alike in groupby(ordered, key=lambda query: len(query.images)):
            yield from chunks(list(alike), self.batch_size)

    def _encode(self, queries: Sequence[Query], padding_side: str = "left") -> dict[str, Tensor]:
        """The processor's inputs for ``queries``: input_ids and attention_mask int64 [B, L], and image tensors."""
        images = [[self._decode(image, query) for image in query.images] for query in queries]
        encoded = self.processor(
            text=[query.prompt for query in queries],
            images=images if any(images) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(encoded.to(self.model.device, self.model.dtype))

    def _decode(self, image: Image.Image, query: Query) -> Image.Image:
        """RGB pixels, or a blank where there are none to be had, so that the rest of its batch can go on."""
        try:
            return pictures.decode(image)
        except (OSError, ValueError, SyntaxError) as error:  # PIL's for what it cannot read
            self._blank[query.image_key] = f"its image cannot be read: {error}"
            return Image.new("RGB", BLANK_SIZE)

    def _tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _generate(self, inputs: dict[str, Any], limits: Limits) -> list[str]:
        length = inputs["input_ids"].shape[1]
        stop = [StopAt(self.tokenizer, limits.until, length)] if limits.until else []
        ids = self.model.generate(
            **inputs,
            max_new_tokens=limits.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList(stop),
        )
        return [cut(text, limits.until) for text in decode(self.tokenizer, ids[:, length:])]

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


def _with_all_metrics(gathered: list[Any]) -> list[Any]:
    """lm-eval wants every metric of every process, also of one without a question that the metric is about."""
    for task, values in gathered[0].items():
        if isinstance(values, dict):
            names = {name for each in gathered for name in each[task]}
            for each in gathered:
                each[task].update({name: [] for name in names - each[task].keys()})
    return gathered


def _let_go(requests: Iterable[Instance]) -> None:
    for request in requests:
        for multimodal in request.args[2:]:
            images = multimodal.get("visual") or []
            multimodal["visual"] = [image if isinstance(image, str) else pictures.key(image) for image in images]


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
