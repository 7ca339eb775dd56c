"""POPE: is an object in the image? Read and scored as LLaVA does; the headline is the mean of the three splits' F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matvlm.evaluate.tasks.data import Files

SPLITS = ("random", "popular", "adversarial")


class Judged(NamedTuple):
    """One answered question: its split, the true answer and what the model's is read as."""

    split: str
    expected: bool
    said: bool


def document(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["category"] not in SPLITS:
        raise ValueError(f"category: is {row['category']!r}, not one of {', '.join(SPLITS)}")
    if row["answer"].strip().lower() not in ("yes", "no"):
        raise ValueError(f"answer: is {row['answer']!r}, not yes or no")
    return {
        "id": f"{row['category']}-{row['question_id']}",
        "image_id": row["image_source"],
        "question": row["question"],
        "target": row["answer"].strip().lower(),
        "category": row["category"],
        "images": [row["image"]],
    }


def original(files: Files) -> list[dict[str, Any]]:
    """``coco_pope_SPLIT.json``, a question a line, and the images in ``val2014``."""
    images = files.path("val2014", "*/val2014", "images")
    return [
        {
            "question_id": line.get("question_id"),
            "image_source": str(line.get("image")).removesuffix(".jpg"),
            "question": line.get("text"),
            "answer": line.get("label"),
            "category": split,
            "image": str(images / str(line.get("image"))),
        }
        for split in SPLITS
        for line in files.lines(f"coco_pope_{split}.json*", f"*/coco_pope_{split}.json*")
    ]


def says_yes(answer: str) -> bool:
    """Whether the answer's first sentence is without a "no" or "not"; commas do not matter."""
    words = answer.strip().partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
    judged = Judged(doc["category"], doc["target"] == "yes", says_yes(answers[0]))
    measures = ("f1", *(f"{measure}_{split}" for split in SPLITS for measure in _MEASURES))
    return {**dict.fromkeys(measures, judged), "right": float(judged.expected == judged.said)}


def f1(judged: Sequence[Judged]) -> float:
    """The mean of the F1 of the splits that were asked."""
    asked = [split for split in SPLITS if any(each.split == split for each in judged)]
    return sum(_of_split(_f1, split, judged) for split in asked) / len(asked)


def _accuracy(judged: Sequence[Judged]) -> float:
    return sum(each.expected == each.said for each in judged) / len(judged)


def _precision(judged: Sequence[Judged]) -> float:
    return _share([each.expected for each in judged if each.said])


def _recall(judged: Sequence[Judged]) -> float:
    return _share([each.said for each in judged if each.expected])


def _f1(judged: Sequence[Judged]) -> float:
    precision, recall = _precision(judged), _recall(judged)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _yes_ratio(judged: Sequence[Judged]) -> float:
    return _share([each.said for each in judged])


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0


def _of_split(measure: Any, split: str, judged: Sequence[Judged]) -> float:
    """The measure over a split; not a number where nothing of the split was asked."""
    chosen = [each for each in judged if each.split == split]
    return measure(chosen) if chosen else float("nan")


_MEASURES = {"accuracy": _accuracy, "precision": _precision, "recall": _recall, "f1": _f1, "yes_ratio": _yes_ratio}

accuracy_random, precision_random, recall_random, f1_random, yes_ratio_random = (
    partial(_of_split, measure, "random") for measure in _MEASURES.values()
)
accuracy_popular, precision_popular, recall_popular, f1_popular, yes_ratio_popular = (
    partial(_of_split, measure, "popular") for measure in _MEASURES.values()
)
accuracy_adversarial, precision_adversarial, recall_adversarial, f1_adversarial, yes_ratio_adversarial = (
    partial(_of_split, measure, "adversarial") for measure in _MEASURES.values()
)
