"""GQA: its rows, and exact match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    if not row["answer"]:
        raise ValueError("answer: is empty")
    return {
        "id": str(row["id"]),
        "image_id": row["imageId"],
        "question": row["question"],
        "target": row["answer"],
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """``testdev_balanced_questions.json`` and the images in ``images``."""
    images = files.path("images", "*/images")
    questions = files.json("testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    return [each | {"id": id, "image": str(images / f"{each.get('imageId')}.jpg")} for id, each in questions.items()]


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 if the answer is the expected one, in lower case and without full stops at its end."""
    return {"accuracy": float(answers[0].strip().rstrip(".").lower() == doc["target"])}
