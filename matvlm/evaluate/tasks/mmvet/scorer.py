"""MM-Vet: 218 open questions, each of which needs some of six capabilities. ``judge`` says how right an answer is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    needed = row["capability"].split(",") if isinstance(row["capability"], str) else row["capability"]
    capabilities = [each.strip() for each in needed]
    if unknown := [each for each in capabilities if each not in CAPABILITIES]:
        raise ValueError(f"capability: {unknown[0]!r} is not one of {', '.join(CAPABILITIES)}")
    if not row["answer"]:
        raise ValueError("answer: is empty")
    return {
        "id": row["question_id"],
        "image_id": row["question_id"],
        "question": row["question"],
        "target": row["answer"],
        "capabilities": capabilities,
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """``mm-vet.json`` and the folder ``images``."""
    images = files.path("images", "*/images")
    return [
        each | {"question_id": id, "image": str(images / str(each.get("imagename")))}
        for id, each in files.json("mm-vet.json", "*/mm-vet.json").items()
    ]


def _of_capability(capability: str, judged: Sequence[tuple[list[str], float]]) -> float:
    """The mean over the questions that need it; not a number if there are none or one of them is not judged."""
    chosen = [correctness for capabilities, correctness in judged if capability in capabilities]
    return sum(chosen) / len(chosen) if chosen else float("nan")


rec, ocr, know, gen, spat, math = (partial(_of_capability, capability) for capability in CAPABILITIES)
