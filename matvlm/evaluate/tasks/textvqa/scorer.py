"""TextVQA: its rows, with or without the words that an OCR system read in the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = list(row["answers"])
    if not answers or not all(isinstance(each, str) for each in answers):
        raise ValueError("answers: must be a list of texts, and not empty")
    return {
        "id": str(row["question_id"]),
        "image_id": row["image_id"],
        "question": row["question"],
        "target": max(answers, key=answers.count),
        "answers": answers,
        "images": [row["image"]],
    }


def document_ocr(row: Mapping[str, Any]) -> dict[str, Any]:
    return document(row) | {"ocr": ", ".join(row["ocr_tokens"])}


def original(files: Files) -> list[dict[str, Any]]:
    """``TextVQA_0.5.1_val.json`` and the images in ``train_images``."""
    images = files.path("train_images")
    return [
        each | {"image": str(images / f"{each.get('image_id')}.jpg")}
        for each in files.json("TextVQA_0.5.1_val.json")["data"]
    ]


def original_ocr(files: Files) -> list[dict[str, Any]]:
    """The same with the tokens of ``TextVQA_Rosetta_OCR_v0.2_val.json``."""
    read = files.json("TextVQA_Rosetta_OCR_v0.2_val.json")["data"]
    tokens = {each["image_id"]: {"ocr_tokens": each["ocr_tokens"]} for each in read}
    return [each | tokens.get(each.get("image_id"), {}) for each in original(files)]
