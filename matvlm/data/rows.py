"""What every source of training data gives: rows of an image and question-answer turns, or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypedDict

IMAGE_MARK = "<image>"
TEXT_ONLY = "text only"
"""The reason of a ``BadSample`` that is well-formed and has no image; nothing is wrong with data that hold some."""


class DataError(ValueError):
    """Data that cannot be used at all; the message names the file and what to do."""


class BadSample(ValueError):
    """One unusable sample. ``reason`` is a short, countable phrase; the message names the sample."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class StoredImage(TypedDict):
    """An image file as the ``datasets`` Image feature stores it: its ``bytes``, or the ``path`` to read it from.

    A path is that of a local file, ``s3://bucket/key``, or ``tar:[archive, offset, size, member]``, the part in JSON.
    """

    bytes: bytes | None
    path: str | None


class Row(TypedDict):
    id: str
    image: StoredImage
    turns: list[dict[str, str]]


Entry = Callable[[], Row]


def turns_in(messages: Any, where: str) -> list[dict[str, str]]:
    """LLaVA's alternating human / gpt messages as turns, without the image mark: the chat template places the image.

    Raises:
        BadSample: they are not that, or are about several images.
    """
    if not isinstance(messages, list):
        raise BadSample("malformed entry", f"{where}: expected an object with a list 'conversations'")
    speakers = [message.get("from") if isinstance(message, dict) else None for message in messages]
    if not messages or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise BadSample("malformed entry", f"{where}: conversations must alternate human, gpt")
    values = [message.get("value") for message in messages]
    if not all(isinstance(value, str) for value in values):
        raise BadSample("malformed entry", f"{where}: every message needs a text 'value'")
    if not is_unicode(values):
        raise BadSample("malformed entry", f"{where}: holds half a surrogate pair, which is no text")
    if sum(value.count(IMAGE_MARK) for value in values) > 1:
        raise BadSample("several images", f"{where}: one {IMAGE_MARK} a conversation is supported")
    texts = [" ".join(part.strip() for part in value.split(IMAGE_MARK)).strip() for value in values]
    return [{"question": q, "answer": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]


def without_image(messages: list[dict[str, str]], where: str) -> BadSample:
    """What a sample of well-formed ``messages`` is whose image field is absent or empty."""
    if any(IMAGE_MARK in message["value"] for message in messages):
        return BadSample("no image", f"{where}: its text has an {IMAGE_MARK} and field 'image' is absent or empty")
    return BadSample(TEXT_ONLY, f"{where}: no image")


def is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
