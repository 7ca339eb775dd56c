"""ScienceQA: the test questions that have an image, multiple choice; the letter is read as LLaVA does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files

LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    choices = list(row["choices"])
    if not 2 <= len(choices) <= len(LETTERS) or row["answer"] not in range(len(choices)):
        raise ValueError(f"choices, answer: {row['answer']!r} must be the number of one of {len(choices)} choices")
    return {
        "id": str(row.get("id", row["row"])),
        "image_id": str(row.get("id", row["row"])),
        "question": row["question"],
        "hint": row["hint"] or "",
        "choices": choices,
        "target": LETTERS[row["answer"]],
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """``problems.json``, ``pid_splits.json`` and the images ``images/test/ID/image.png``."""
    problems = files.json("problems.json")
    folder = files.path("images/test", "test", "images")
    return [
        problems[id] | {"id": id, "image": str(folder / id / problems[id]["image"])}
        for id in files.json("pid_splits.json")["test"]
        if problems[id].get("image")
    ]


def prompt(doc: Mapping[str, Any]) -> str:
    hint = [f"Context: {doc['hint']}"] if doc["hint"] else []
    options = [f"{letter}. {text}" for letter, text in zip(LETTERS, doc["choices"], strict=False)]
    ask = "Answer with the option's letter from the given choices directly."
    return "\n".join(["<image>", *hint, doc["question"], *options, ask])


def read(answer: str) -> str:
    """The letter that the answer is, begins with (``B. because``), or says in the one sentence ``The answer is B.``"""
    answer = answer.strip()
    if answer in tuple(LETTERS):
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    said = _SENTENCE.findall(answer)
    return said[0] if len(said) == 1 else ""


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    return {"accuracy": float(read(answers[0]) == doc["target"])}
