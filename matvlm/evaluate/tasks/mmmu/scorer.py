"""MMMU: college exams, multiple choice and open questions with one or several images, as its own evaluation reads them.

All images of a question are shown, each where its mark stands, and an answer that chooses no option is a guess, by a
random choice that depends on the question alone.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LETTERS = "ABCDEFGHI"
_MARK = re.compile(r"<image ([1-7])>")
_AROUND = ",.!?;:'"
_LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What comes before the essence of an answer."""
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, with an exponent, plain."""


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    options = [str(option) for option in ast.literal_eval(row["options"])]
    choice = row["question_type"] == "multiple-choice"
    answers = [row["answer"]]
    if not choice and row["answer"].startswith("["):
        answers = [str(answer) for answer in ast.literal_eval(row["answer"])]
    if choice and (not 2 <= len(options) <= len(LETTERS) or row["answer"] not in LETTERS[: len(options)]):
        raise ValueError(f"options, answer: {row['answer']!r} must be the letter of one of {len(options)} options")
    if not all(answers):
        raise ValueError("answer: is empty")
    doc = {"question": row["question"], "options": options if choice else [], "open": not choice}
    shown = _MARK.findall(_prompt(doc))
    return doc | {
        "id": row["id"],
        "image_id": [f"{row['id']}/image_{number}" for number in shown],
        "target": answers[0],
        "answers": answers,
        "images": [row[f"image_{number}"] for number in shown],
    }


def prompt(doc: Mapping[str, Any]) -> str:
    return _MARK.sub("<image>", _prompt(doc))


def _prompt(doc: Mapping[str, Any]) -> str:
    """With the images' numbers in their marks."""
    if doc["open"]:
        return f"{doc['question']}\n\nAnswer the question using a single word or phrase."
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, doc["options"], strict=False))
    return f"{doc['question']}\n\n{options}\n\nAnswer with the option's letter from the given choices directly."


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    if doc["open"]:
        return {"accuracy": float(is_right(read_open(answers[0]), doc["answers"]))}
    options = dict(zip(LETTERS, doc["options"], strict=False))
    guess = random.Random(doc["id"])
    return {"accuracy": float(read_choice(answers[0], options, lambda: guess.choice(list(options))) == doc["target"])}


def read_choice(answer: str, options: Mapping[str, str], guess: Callable[[], str]) -> str:
    """The option's letter in brackets, else alone, else in more than five words the option that is named; else a guess.

    Of several the last one counts.
    """
    for mark in _AROUND:
        answer = answer.strip(mark)
    answer = f" {answer} "
    lower = answer.lower()
    found = {letter: answer.rfind(f"({letter})") for letter in options}
    if max(found.values()) < 0:
        found = {letter: answer.rfind(f" {letter} ") for letter in options}
    if max(found.values()) < 0 and len(answer.split()) > 5:
        found = {letter: lower.rfind(text.lower()) for letter, text in options.items()}
    last = max(found, key=found.__getitem__)
    return last if found[last] >= 0 else guess()


def read_open(answer: str) -> list[str | float]:
    """What an answer to an open question may mean: the ends of its lines after such as "is", and their numbers."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    ends = []
    for number, line in enumerate(lines, start=1):
        end = ""
        for lead in (*_LEADS, *(["="] if number == len(lines) else [])):
            tail = line.rpartition(lead)[2].strip()
            if lead in line and (not end or len(tail) < len(end)):
                end = tail
        if end and end not in tuple(_AROUND):
            ends.append(end)
    ends = ends or [answer]
    numbers = [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]
    return [meaning for text in ends + numbers for meaning in _meanings(text)]


def is_right(said: Sequence[str | float], expected: Sequence[str]) -> bool:
    """Whether an expected number was said, or a text holds an expected one."""
    meanings = [meaning for text in expected for meaning in _meanings(text)]
    texts = [meaning for meaning in meanings if isinstance(meaning, str)]
    return any(any(text in each for text in texts) if isinstance(each, str) else each in meanings for each in said)


def _meanings(text: str) -> list[str | float]:
    """A number to two places; or the text in lower case, where a single letter needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
