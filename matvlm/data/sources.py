"""Where conversations come from: the easy-VQA package, or a LLaVA-format JSON / JSONL file with images in a folder.

A source is a list of ``Entry`` functions. Calling one returns a ``Row`` (id, image, turns) or raises ``BadSample``, so
that one malformed entry can be counted and skipped without touching the rest. Ids carry the sample's number and are
therefore unique, whatever the file calls its samples.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from matvlm.config import Data

IMAGE_MARK = "<image>"


class DataError(ValueError):
    """Data that cannot be used at all; the message names the file and what to do."""


class BadSample(ValueError):
    """One unusable sample. ``reason`` is a short, countable phrase; the message names the sample."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class StoredImage(TypedDict):
    """An image file as the ``datasets`` Image feature stores it: its ``bytes``, or the ``path`` to read it from."""

    bytes: bytes | None
    path: str | None


class Row(TypedDict):
    id: str
    image: StoredImage
    turns: list[dict[str, str]]


Entry = Callable[[], Row]


def entries(data: Data) -> list[Entry]:
    """Every sample of the recipe's source, in the source's order.

    Raises:
        DataError: the file is missing, is not JSON, or holds no list of samples.
    """
    return _easyvqa() if data.source == "easyvqa" else _llava(Path(data.path or ""), data.image_folder)


def _easyvqa() -> list[Entry]:
    """One entry per training image, with all its questions as turns (4,000 images, 38,575 questions)."""
    import easy_vqa

    turns: dict[int, list[dict[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        turns[image].append({"question": question, "answer": answer})
    paths = easy_vqa.get_train_image_paths()
    return [partial(_easyvqa_row, image, Path(paths[image]), turns[image]) for image in sorted(turns)]


def _easyvqa_row(image: int, path: Path, turns: list[dict[str, str]]) -> Row:
    id = f"easyvqa-{image}"
    return {"id": id, "image": {"bytes": read_image(path, id), "path": None}, "turns": turns}


def _llava(path: Path, image_folder: str | None) -> list[Entry]:
    folder = Path(image_folder) if image_folder else path.parent
    return [partial(_llava_row, number, raw, path, folder) for number, raw in enumerate(_read_json(path))]


def _read_json(path: Path) -> list[Any]:
    """The samples of a JSON list or of a JSONL file, where a malformed line becomes a ``BadSample`` to raise later."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the conversations (data.path): {error}") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)  # splitlines would also cut at separators inside a text
        return [_parse_line(line, f"{path.name}, line {number}") for number, line in lines if line.strip()]
    try:
        samples = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(samples, list):
        raise DataError(f"{path}: expected a list of samples at the top, got {type(samples).__name__}")
    return samples


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadSample("malformed JSON", f"{where}, column {error.colno}: {error.msg}")


def _llava_row(number: int, raw: Any, path: Path, folder: Path) -> Row:
    where = f"{path.name}, sample {number}"
    if isinstance(raw, BadSample):
        raise raw
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise BadSample("malformed entry", f"{where}: expected an object with a list 'conversations'")
    if not raw.get("image"):
        raise BadSample("no image", f"{where}: field 'image' is absent or empty")
    if not isinstance(raw["image"], str):
        raise BadSample("malformed entry", f"{where}: field 'image' must be one file name")
    if not _is_unicode(raw):
        raise BadSample("malformed entry", f"{where}: holds half a surrogate pair, which is no text")
    image = str((folder / raw["image"]).absolute())
    return {
        "id": f"{raw.get('id', 'sample')}-{number}",
        "image": {"bytes": None, "path": image},
        "turns": _turns(raw["conversations"], where),
    }


def _turns(messages: list[Any], where: str) -> list[dict[str, str]]:
    """LLaVA's alternating human / gpt messages as turns, without the image mark: the chat template places the image."""
    speakers = [message.get("from") if isinstance(message, dict) else None for message in messages]
    if not messages or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise BadSample("malformed entry", f"{where}: conversations must alternate human, gpt")
    values = [message.get("value") for message in messages]
    if not all(isinstance(value, str) for value in values):
        raise BadSample("malformed entry", f"{where}: every message needs a text 'value'")
    if sum(value.count(IMAGE_MARK) for value in values) > 1:
        raise BadSample("several images", f"{where}: one {IMAGE_MARK} a conversation is supported")
    texts = [" ".join(part.strip() for part in value.split(IMAGE_MARK)).strip() for value in values]
    return [{"question": q, "answer": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]


def _is_unicode(raw: Any) -> bool:
    try:
        json.dumps(raw, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image(path: str | Path, where: str) -> bytes:
    """The content of the image file at ``path``.

    Raises:
        BadSample: there is none, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise BadSample("missing image", f"{where}: {error}") from None
