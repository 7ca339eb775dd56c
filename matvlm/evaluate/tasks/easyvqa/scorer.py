"""easy-VQA's own test split, 1,000 images with 9,673 questions, from its package.

The prompt is the bare question, or one that asks for a sentence; the score is exact match after ``normalise``: over all
questions and per kind of question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

KINDS = ("yes_no", "color", "shape")
_SHAPES = {"circle", "rectangle", "triangle"}


def load(*, name: str, phrase: Callable[[str, str], tuple[str, str]] | None = None, **_: Any) -> dict[str, Any]:
    """The split as lm-eval wants it.

    Args:
        phrase: makes of a question and its answer the question to ask and the ``sentence`` to expect.
    """
    import easy_vqa
    from datasets import Dataset

    paths = easy_vqa.get_test_image_paths()
    rows = [
        {
            "id": f"{name}-{number}",
            "image_id": str(image),
            "question": question,
            "expected": answer,
            "images": [str(paths[image])],
        }
        for number, (question, answer, image) in enumerate(zip(*easy_vqa.get_test_questions(), strict=True))
    ]
    if phrase:
        for row in rows:
            row["question"], row["sentence"] = phrase(row["question"], row["expected"])
    dataset = Dataset.from_list(rows)
    dataset.info.description = json.dumps({"source": "the easy-vqa package", "questions": len(rows), "left_out": []})
    return {"test": dataset}


def prompt(doc: Mapping[str, Any]) -> str:
    """A function, since a Jinja text in the YAML is compiled anew for every question."""
    return f"<image>{doc['question']}"


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 or 0.0 for the first of ``answers``, as the overall accuracy and as that of the question's kind."""
    right = float(normalise(answers[0]) == normalise(doc.get("sentence", doc["expected"])))
    return {"accuracy": right, f"accuracy_{kind(doc['expected'])}": right}


def normalise(answer: str) -> str:
    """Lower case, without surrounding space and without a full stop at the end."""
    return answer.strip().lower().removesuffix(".").rstrip()


def kind(expected: str) -> str:
    """Which of ``KINDS`` a question with the answer ``expected`` is."""
    if expected in ("yes", "no"):
        return "yes_no"
    return "shape" if expected in _SHAPES else "color"
