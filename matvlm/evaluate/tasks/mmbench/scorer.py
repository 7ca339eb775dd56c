"""MMBench: multiple choice in which a question counts only if it is right in every order of its options.

The rows whose index is at least a million are such orders of the question ``index % 1,000,000``.
"""

from __future__ import annotations

import base64
import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files

ROTATION = 1_000_000
LETTERS = "ABCD"
_PUNCTUATION = ".,:;!?()[]{}*'\""


class Judged(NamedTuple):
    """One answered row: the question that it is an order of, and whether the answer is right."""

    question: int
    right: bool


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    if not _text(row["answer"]):
        raise ValueError("answer: is empty")
    doc = _question(row) | {"target": row["answer"]}
    if doc["target"] not in doc["options"]:
        raise ValueError(f"answer: is {doc['target']!r}, which is none of the options")
    return doc


def document_test(row: Mapping[str, Any]) -> dict[str, Any]:
    return _question(row) | {"target": ""}


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    index = int(row["index"])
    texts = {letter: _text(row[letter]) for letter in LETTERS}
    options = {letter: text for letter, text in texts.items() if text}
    if len(options) < 2:
        raise ValueError("A, B, C, D: fewer than two are options")
    return {
        "id": str(index),
        "image_id": str(index % ROTATION),
        "question": row["question"],
        "index": index,
        "hint": _text(row["hint"]),
        "options": list(options),
        "choices": list(options.values()),
        "category": _text(row["category"]),
        "images": [_decoded(row["image"]) if isinstance(row["image"], str) else row["image"]],
    }


def _decoded(image: str) -> bytes:
    try:
        return base64.b64decode(image)
    except ValueError as error:
        raise ValueError(
            f"image: {image[:20]!r} is neither base64 nor the index of a row with an image: {error}"
        ) from None


def _text(value: Any) -> str:
    """A cell's text; nothing where it says that there is none."""
    text = "" if value is None else str(value)
    return "" if text.lower() in ("nan", "none") else text


def original_dev(files: Files) -> list[dict[str, Any]]:
    """``mmbench_dev_20230712.tsv`` or a later release, with images in base64."""
    return _table(files, "*dev*.tsv", "*DEV*.tsv")


def original_test(files: Files) -> list[dict[str, Any]]:
    return _table(files, "*test*.tsv", "*TEST*.tsv")


def _table(files: Files, *names: str) -> list[dict[str, Any]]:
    """The rows; where one has another's index for an image, it has that image."""
    csv.field_size_limit(1 << 30)
    with open(files.path(*names), encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file, delimiter="\t"))
    images = {row["index"]: row["image"] for row in rows}
    return [{"hint": "", "category": ""} | row | {"image": images.get(row["image"], row["image"])} for row in rows]


def prompt(doc: Mapping[str, Any]) -> str:
    hint = [doc["hint"]] if doc["hint"] else []
    options = [f"{letter}. {text}" for letter, text in zip(doc["options"], doc["choices"], strict=True)]
    ask = "Answer with the option's letter from the given choices directly."
    return "\n".join(["<image>", *hint, doc["question"], *options, ask])


def read(answer: str, options: Mapping[str, str]) -> str:
    """The letter that the answer chooses, or nothing: the only letter that stands alone, else the only option named.

    A bare "A" among more than three words is an article.
    """
    words = answer.split()
    marked = {word: word.strip(_PUNCTUATION) for word in words}
    if len(words) > 3:
        marked.pop("A", None)
    letters = set(marked.values()) & set(options)
    if len(letters) == 1:
        return letters.pop()
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else ""


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
    options = dict(zip(doc["options"], doc["choices"], strict=True))
    right = read(answers[0], options) == doc["target"]
    return {"circular_accuracy": Judged(doc["index"] % ROTATION, right), "right": float(right)}


def score_test(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether an option is chosen; the answers to this split are not public."""
    options = dict(zip(doc["options"], doc["choices"], strict=True))
    return {"answered": float(bool(read(answers[0], options)))}


def circular_accuracy(judged: Sequence[Judged]) -> float:
    """The share of questions that are right in every order that was asked."""
    questions = defaultdict(list)
    for each in judged:
        questions[each.question].append(each.right)
    return sum(map(all, questions.values())) / len(questions)
