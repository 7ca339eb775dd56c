"""Two tiny untrained models that talk without end, and what transformers' own ``generate`` lets them say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_teacher import TINY, WORDS
from transformers import LlavaProcessor

from matvlm.data.encoding import Turn
from matvlm.init import convert_
from matvlm.models import hybrid, small

QUESTION = "what shape is the image"


class Typed(LlavaProcessor):
    """Also says of each token whether it is the image's, as some families' processors do unasked."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, return_mm_token_type_ids=True)


def build_processor(typed: bool = False) -> Any:
    """That of the models here; ``typed`` as ``Typed`` says."""
    processor = small.build_processor(TINY, small.build_tokenizer(WORDS))
    processor.__class__ = Typed if typed else LlavaProcessor
    return processor


def save(folder: Path) -> None:
    """A ``teacher``, a ``student`` that names it, an ``orphan`` whose teacher is gone, and ``picture.png``."""
    processor = build_processor()
    hybrid.save(small.build_model(TINY, processor.tokenizer), processor, folder / "teacher", {})
    for name, teacher in (("student", folder / "teacher"), ("orphan", folder / "gone")):
        student = small.build_model(TINY, processor.tokenizer)
        convert_(student, [0], "random")
        hybrid.save(student, processor, folder / name, {"teacher": str(teacher)})
    picture().save(folder / "picture.png")


def picture() -> Image.Image:
    """Noise, so that every pixel counts."""
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy())


def prompt(processor: Any, question: str, turns: list[Turn]) -> dict[str, Any]:
    """The processor's own inputs for a question after ``turns``, the whole conversation tokenised in one piece."""
    messages: list[dict[str, Any]] = []
    for asked, answer in [*turns, (question, None)]:
        image = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": asked}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], images=[picture()], return_tensors="pt", add_special_tokens=False))


def answer(model: Any, processor: Any, question: str, turns: list[Turn], max_new_tokens: int) -> str:
    """The greedy answer by ``generate``."""
    inputs = prompt(processor, question, turns)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
