"""Where conversations come from: the easy-VQA package, a LLaVA-format JSON / JSONL file, or a ``datasets`` data set.

A source is a list of ``Entry`` functions. Calling one returns a ``Row`` (id, image, turns) or raises ``BadSample``, so
that one malformed entry can be counted and skipped without touching the rest. Ids carry the sample's number and are
therefore unique, whatever the source calls its samples.
"""

from __future__ import annotations

import json
import posixpath
from collections import defaultdict
from functools import partial
from typing import Any

from matvlm.config import Data
from matvlm.data.hub import hub_entries
from matvlm.data.images import ImageFolder, read_image
from matvlm.data.rows import BadSample, DataError, Entry, Row, is_unicode, turns_in, without_image
from matvlm.evaluate.tasks.easyvqa.phrasing import in_a_sentence
from matvlm.storage import read_bytes


def entries(data: Data) -> list[Entry]:
    """Every sample of the recipe's source, in the source's order.

    Raises:
        DataError: the file or data set is missing, is not of a known format, or an image archive is unusable.
        StorageError: S3 cannot be reached.
    """
    if data.source == "easyvqa":
        return _easyvqa(data.answers)
    return _llava(data.path or "", data.image_folder) if data.source == "llava" else hub_entries(data)


def _easyvqa(answers: str) -> list[Entry]:
    """One entry per training image, with all its questions as turns (4,000 images, 38,575 questions).

    With ``answers`` "both", the even images start with a sentence, the odd ones with a word, and then they take turns.
    """
    import easy_vqa

    turns: dict[int, list[dict[str, str]]] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        if answers == "sentences" or (answers == "both" and (image + len(turns[image])) % 2 == 0):
            question, answer = in_a_sentence(question, answer)
        turns[image].append({"question": question, "answer": answer})
    paths = easy_vqa.get_train_image_paths()
    return [partial(_easyvqa_row, image, str(paths[image]), turns[image]) for image in sorted(turns)]


def _easyvqa_row(image: int, path: str, turns: list[dict[str, str]]) -> Row:
    id = f"easyvqa-{image}"
    content = read_image({"bytes": None, "path": path}, id)
    return {"id": id, "image": {"bytes": content, "path": None}, "turns": turns}


def _llava(path: str, image_folder: str | None) -> list[Entry]:
    samples = _read_json(path)
    images = ImageFolder(image_folder or posixpath.dirname(path) or ".")
    name = posixpath.basename(path)
    return [partial(_llava_row, number, raw, name, images) for number, raw in enumerate(samples)]


def _read_json(path: str) -> list[Any]:
    """The samples of a JSON list or of a JSONL file, where a malformed line becomes a ``BadSample`` to raise later."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the conversations (data.path): {error}") from None
    if path.endswith(".jsonl"):
        lines = enumerate(text.split("\n"), start=1)  # splitlines would also cut at separators inside a text
        name = posixpath.basename(path)
        return [_parse_line(line, f"{name}, line {number}") for number, line in lines if line.strip()]
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


def _llava_row(number: int, raw: Any, file: str, images: ImageFolder) -> Row:
    where = f"{file}, sample {number}"
    if isinstance(raw, BadSample):
        raise raw
    messages = raw.get("conversations") if isinstance(raw, dict) else None
    turns = turns_in(messages, where)
    if not raw.get("image"):
        raise without_image(messages or [], where)
    if not isinstance(raw["image"], str):
        raise BadSample("malformed entry", f"{where}: field 'image' must be one file name")
    id = f"{raw.get('id', 'sample')}-{number}"
    if not is_unicode([id, raw["image"]]):
        raise BadSample("malformed entry", f"{where}: holds half a surrogate pair, which is no text")
    return {"id": id, "image": images.find(raw["image"], where), "turns": turns}
