"""Question-answer turns and an image -> token ids, labels and pixels, with the model's own processor and chat template.

A conversation is cut into segments: the prompt up to the assistant's first word, the first answer with its end mark,
the next prompt, and so on. Each segment is tokenised by itself, so the tokens before an answer are the same in
training, in teacher targets and in generation, whatever the tokenizer merges. Labels are the answers with their end
marks; everything else is ``IGNORE``, also what a template writes between an end mark and the next prompt.

Shapes: B samples, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matvlm.config import Positions

IGNORE = -100
REMEMBERED = 10_000
"""Tokenised conversations kept by an encoder, at some 10 kB each for long ones."""


class TooLong(ValueError):
    """A sample whose first turn alone is longer than ``max_length``."""


class TemplateError(ValueError):
    """A chat template that training samples cannot be made with."""


class Turn(NamedTuple):
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One encoded conversation: ``input_ids`` and ``labels`` int64 [L], ``image_inputs`` as the processor has them.

    Among these may be what it says of each token, [1, L], as of which kind it is.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    image_inputs: dict[str, Tensor]

    def image_input(self, name: str, length: int) -> Tensor:
        """The one of this ``name``, of ``length`` tokens if it is about tokens."""
        value = self.image_inputs[name]
        return _longer(value, length) if value.shape == (1, len(self.input_ids)) else value


@dataclass(frozen=True)
class Batch:
    """Right-padded samples, or packed ones (``matvlm.data.packing``). ``inputs`` goes to the model as it is; ``labels``
    int64 [B, L].
    """

    ids: list[str]
    inputs: dict[str, Tensor]
    labels: Tensor
    chosen: Tensor | None = None
    """bool [B, L]: the positions to keep; None keeps those before answer tokens."""
    mask: Tensor | None = None
    """bool [B, L]: tokens that are no padding, where ``inputs`` do not say it."""
    places: Tensor | None = None
    """``kept_places``, where they have been looked for already."""

    @property
    def real(self) -> Tensor:
        """bool [B, L]: tokens that are no padding."""
        return self.inputs["attention_mask"].bool() if self.mask is None else self.mask

    def unmasked(self) -> Batch:
        """The same without an attention mask for the model; exact for a causal one, as padding is on the right.

        Attention without a mask has the fastest kernels, and what it gives at the padding is never looked at.
        """
        inputs = {name: value for name, value in self.inputs.items() if name != "attention_mask"}
        return replace(self, inputs=inputs, mask=self.real)

    @property
    def kept(self) -> Tensor:
        """bool [B, L]: positions at which student and teacher are compared, as the encoder's ``positions`` say."""
        return self._before_answers() if self.chosen is None else self.chosen

    @property
    def kept_labels(self) -> Tensor:
        """int64 [P]: the label of the token after each kept position, ``IGNORE`` where that is no answer token."""
        following = torch.full_like(self.labels, IGNORE)
        following[:, :-1] = self.labels[:, 1:]
        return following.flatten()[self.kept_places]

    @property
    def kept_places(self) -> Tensor:
        """int64 [P]: the kept positions, counted through all samples."""
        return self.kept.flatten().nonzero()[:, 0] if self.places is None else self.places

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``; what has to be looked for is found before, so that nobody waits for a GPU."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        labels = self.labels.to(device, non_blocking=True)
        chosen, mask, places = (
            None if value is None else value.to(device, non_blocking=True)
            for value in (self.chosen, self.mask, self.kept_places)
        )
        return Batch(self.ids, inputs, labels, chosen, mask, places)

    def pinned(self) -> Batch:
        """The same in memory that a GPU can copy from while it computes."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        chosen, mask = (None if value is None else value.pin_memory() for value in (self.chosen, self.mask))
        labels, places = self.labels.pin_memory(), self.kept_places.pin_memory()
        return Batch(self.ids, inputs, labels, chosen, mask, places)

    def _before_answers(self) -> Tensor:
        kept = torch.zeros_like(self.labels, dtype=torch.bool)
        kept[:, :-1] = self.labels[:, 1:] != IGNORE
        return kept


class Encoder:
    """Encodes conversations about one image with a Hugging Face ``processor`` that has a chat template."""

    def __init__(self, processor: Any, max_length: int = 2048, positions: Positions = "answer"):
        """``positions`` become ``Batch.kept``: those before an ``answer`` token, those of a ``text`` token before
        another one (no image token on either side), or ``all`` real tokens.

        Raises:
            ValueError: ``positions`` is ``text`` and the processor does not say which token stands for an image.
        """
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.pad: int = self.tokenizer.pad_token_id or 0
        """Any token will do: nothing looks at padding."""
        self.max_length = max_length
        self.positions = positions
        self.image_token = getattr(processor, "image_token_id", None)
        if positions == "text" and self.image_token is None:
            raise ValueError(
                f"targets.positions: {type(processor).__name__} has no image_token_id, so text cannot be told from the "
                "image; use answer or all"
            )
        self._segments = lru_cache(maxsize=REMEMBERED)(self._split)

    def prompt(self, question: str) -> str:
        """The text that asks ``question`` about an image, ready for the processor and for generation."""
        return self._render([_user(question, with_image=True)], generate=True)

    def ask(self, image: Image.Image, question: str, turns: Sequence[Turn] = ()) -> dict[str, Tensor]:
        """The processor's inputs [1, L] to answer ``question`` after ``turns`` about ``image``; of any length.

        Token by token what stands before that answer in training.

        Raises:
            ValueError: the question holds the token that stands for an image.
            TemplateError: the chat template rewrites earlier turns when later ones are added.
        """
        mark = getattr(self.processor, "image_token", None)
        if mark and mark in question:
            raise ValueError(f"the question holds {mark}, which stands for the image itself: leave it out")
        first_prompt, segments = self._segments((*turns, Turn(question, "")))
        inputs = self.processor(text=[first_prompt], images=[image], return_tensors="pt", add_special_tokens=False)
        *before, (prompt, _) = segments
        later = torch.tensor([[token for said, answer in before for token in said + answer] + prompt], dtype=torch.long)
        shape = inputs["input_ids"].shape
        added = {"input_ids": later, "attention_mask": torch.ones_like(later)}
        length = shape[1] + later.shape[1]
        asked = {name: _longer(value, length) if value.shape == shape else value for name, value in inputs.items()}
        return asked | {name: torch.cat([inputs[name], tokens], dim=1) for name, tokens in added.items()}

    def encode(self, id: str, image: Image.Image, turns: Sequence[Turn]) -> Sample:
        """One training sample. Turns that do not fit into ``max_length`` tokens are dropped, last ones first.

        Raises:
            TooLong: not even the first turn fits.
            TemplateError: the chat template rewrites earlier turns when later ones are added.
        """
        first_prompt, segments = self._segments(tuple(turns))
        encoded = self.processor(text=[first_prompt], images=[image], return_tensors="pt", add_special_tokens=False)
        first = encoded.pop("input_ids")
        ids = first[0].tolist()
        encoded.pop("attention_mask", None)
        labels = [IGNORE] * len(ids)
        for number, (prompt, answer) in enumerate(segments):
            if len(ids) + len(prompt) + len(answer) > self.max_length:
                if number == 0:
                    raise TooLong(f"sample {id}: its first turn needs more than max_length={self.max_length} tokens")
                break
            ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
        images = {
            name: _longer(value, len(ids)) if value.shape == first.shape else value for name, value in encoded.items()
        }
        return Sample(id, torch.tensor(ids), torch.tensor(labels), images)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Right-pad ``samples`` to the longest and stack their image inputs."""
        ids = pad_sequence([s.input_ids for s in samples], batch_first=True, padding_value=self.pad)
        labels = pad_sequence([s.labels for s in samples], batch_first=True, padding_value=IGNORE)
        lengths = torch.tensor([len(s.input_ids) for s in samples])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        images = {
            name: torch.cat([s.image_input(name, ids.shape[1]) for s in samples]) for name in samples[0].image_inputs
        }
        inputs = {"input_ids": ids, "attention_mask": mask, **images}
        return Batch([s.id for s in samples], inputs, labels, self._chosen(ids, mask.bool()))

    def _chosen(self, ids: Tensor, real: Tensor) -> Tensor | None:
        if self.positions == "answer":
            return None
        if self.positions == "all":
            return real
        text = real & (ids != self.image_token)
        chosen = torch.zeros_like(text)
        chosen[:, :-1] = text[:, :-1] & text[:, 1:]
        return chosen

    def _split(self, turns: tuple[Turn, ...]) -> tuple[str, list[tuple[list[int], list[int]]]]:
        """The first prompt as text, and per turn the token ids of (prompt after the first, answer)."""
        messages: list[dict[str, Any]] = []
        first_prompt, done, segments = "", "", []
        for turn in turns:
            messages.append(_user(turn.question, with_image=not messages))
            prompt = self._render(messages, generate=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
            full = self._render(messages, generate=False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise TemplateError("the chat template rewrites earlier turns: no training sample can be made with it")
            answer = self._until_end_mark(full[len(prompt) :])
            first_prompt = first_prompt or prompt
            segments.append((self._tokenize(prompt[len(done) :]) if done else [], self._tokenize(answer)))
            done = prompt + answer
        return first_prompt, segments

    def _until_end_mark(self, text: str) -> str:
        """``text`` without what follows its last end mark; it belongs to the next prompt."""
        mark = self.tokenizer.eos_token
        return text[: text.rindex(mark) + len(mark)] if mark and mark in text else text

    def _render(self, messages: list[dict[str, Any]], generate: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _longer(per_token: Tensor, length: int) -> Tensor:
    """What a processor says of each token, [1, L], for ``length`` tokens: it counts text as 0."""
    return F.pad(per_token, (0, length - per_token.shape[1]))


def _user(question: str, with_image: bool) -> dict[str, Any]:
    image = [{"type": "image"}] if with_image else []
    return {"role": "user", "content": [*image, {"type": "text", "text": question}]}
