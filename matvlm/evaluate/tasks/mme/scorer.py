"""MME: two questions about each image, one with the answer yes and one with no.

A category's score is its accuracy in percent plus its accuracy+ in percent, the share of images with both questions
right. Perception is the sum over ten categories, cognition over four.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
_SUFFIX = " Please answer yes or no."


class Judged(NamedTuple):
    """One answered question: its category, the image within it, and whether the answer is right."""

    category: str
    image: str
    right: bool


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["category"] not in (*PERCEPTION, *COGNITION):
        raise ValueError(f"category: is {row['category']!r}, which MME does not have")
    target = row["answer"].strip().lower()
    if target not in ("yes", "no"):
        raise ValueError(f"answer: is {row['answer']!r}, not yes or no")
    image_id = f"{row['category']}/{row['question_id'].rpartition('/')[2]}"
    return {
        "id": f"{image_id}-{crc32(row['question'].encode()):08x}",
        "image_id": image_id,
        "question": row["question"].replace(_SUFFIX, "").strip(),
        "target": target,
        "category": row["category"],
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """A folder for each category, with a text file of ``question TAB answer`` lines beside each image or in
    ``questions_answers_YN``, with the images in ``images``."""
    rows = []
    for category in (*PERCEPTION, *COGNITION):
        folder = files.path(category, f"*/{category}", f"*/*/{category}")
        texts = folder / "questions_answers_YN"
        for text in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            images = sorted((folder / "images" if texts.is_dir() else folder).glob(f"{text.stem}.[jp][pn]*g"))
            name = images[0].name if images else f"{text.stem}.jpg"
            place = images[0] if images else text.with_suffix(".jpg")
            for line in text.read_text(encoding="utf-8").splitlines():
                question, _, answer = line.partition("\t")
                row = {"question_id": name, "question": question.strip(), "answer": answer, "category": category}
                rows.append(row | {"image": str(place)})
    return rows


def read(answer: str) -> str:
    """``yes``, ``no`` or ``other``: the answer without full stops, its one letter, or a word in its first four."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
    right = read(answers[0]) == doc["target"]
    judged = Judged(doc["category"], doc["image_id"], right)
    return {**dict.fromkeys(("perception", "cognition", *PERCEPTION, *COGNITION), judged), "right": float(right)}


def category_score(category: str, judged: Sequence[Judged]) -> float:
    """0 to 200; not a number where nothing of the category was asked. An image counts with what was asked about it."""
    images = defaultdict(list)
    for each in judged:
        if each.category == category:
            images[each.image].append(each.right)
    if not images:
        return float("nan")
    accuracy = sum(map(sum, images.values())) / sum(map(len, images.values()))
    return 100 * accuracy + 100 * sum(map(all, images.values())) / len(images)


def _sum(categories: Sequence[str], judged: Sequence[Judged]) -> float:
    """Over those categories that were asked."""
    asked = {each.category for each in judged}.intersection(categories)
    return sum(category_score(category, judged) for category in asked) if asked else float("nan")


perception, cognition = partial(_sum, PERCEPTION), partial(_sum, COGNITION)
existence, count, position, color, posters, celebrity, scene, landmark, artwork, OCR = (
    partial(category_score, category) for category in PERCEPTION
)
commonsense_reasoning, numerical_calculation, text_translation, code_reasoning = (
    partial(category_score, category) for category in COGNITION
)
