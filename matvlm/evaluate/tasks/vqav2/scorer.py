"""VQA v2: its rows, and the file for the evaluation server, the only place where test-dev is scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = [each["answer"] for each in row["answers"]]
    if not answers or not all(isinstance(each, str) for each in answers):
        raise ValueError("answers: must be a list of texts, and not empty")
    return _question(row) | {
        "target": row["multiple_choice_answer"],
        "answers": answers,
        "answer_type": row["answer_type"],
    }


def document_testdev(row: Mapping[str, Any]) -> dict[str, Any]:
    return _question(row) | {"target": ""}


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": str(row["question_id"]),
        "image_id": str(row["image_id"]),
        "question": row["question"],
        "question_id": row["question_id"],
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """The questions and annotations of val2014, and its images."""
    questions = files.json("v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    annotations = files.json("v2_mscoco_val2014_annotations.json")["annotations"]
    images = files.path("val2014")
    question_of = {each["question_id"]: each for each in questions}
    return [
        each
        | question_of.get(each.get("question_id"), {})
        | {"image": str(images / f"COCO_val2014_{each.get('image_id', 0):012d}.jpg")}
        for each in annotations
    ]


def original_testdev(files: Files) -> list[dict[str, Any]]:
    """The questions of test-dev, the official ones or as LLaVA has them, and the images of test2015."""
    found = files.path("v2_OpenEnded_mscoco_test-dev2015_questions.json", "llava_vqav2_mscoco_test-dev2015.jsonl")
    images = files.path("test2015")
    if found.suffix == ".json":
        return [
            each | {"image": str(images / f"COCO_test2015_{each.get('image_id', 0):012d}.jpg")}
            for each in files.json(found.name)["questions"]
        ]
    return [
        {
            "question_id": line["question_id"],
            "image_id": int(line["image"].removesuffix(".jpg").rpartition("_")[2]),
            "question": line["text"].partition("\n")[0],
            "image": str(images / line["image"]),
        }
        for line in files.lines(found.name)
    ]


def score_testdev(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether there is an answer at all; the answers to this split are not public."""
    return {"answered": float(bool(answers[0].strip()))}
