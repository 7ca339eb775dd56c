"""The ``easyvqa`` task for lm-eval: easy-VQA's own test split, 1,000 images with 9,673 questions, from its package.

The prompt is the bare question, the score exact match after ``normalise``: over all questions and per kind of question.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask
from PIL import Image

NAME = "easyvqa"
SPLIT = "test"
KINDS = ("yes_no", "color", "shape")
_SHAPES = {"circle", "rectangle", "triangle"}


def task() -> ConfigurableTask:
    """The task, ready for ``lm_eval.evaluator.evaluate``. Its documents have id, image_id, question and expected."""
    metrics = ["accuracy", *(f"accuracy_{kind}" for kind in KINDS)]
    config = {
        "task": NAME,
        "custom_dataset": _load,
        "test_split": SPLIT,
        "output_type": "generate_until",
        "doc_to_text": lambda doc: "<image>" + doc["question"],  # a Jinja string is compiled anew for every question
        "doc_to_target": "expected",
        "doc_to_image": lambda doc: [_image(doc["image_id"])],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "num_fewshot": 0,
        "process_results": score,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": 1},
    }
    return ConfigurableTask(config=config)


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, float]:
    """1.0 or 0.0 for the first of ``answers``, as the overall accuracy and as that of the question's kind."""
    right = float(normalise(answers[0]) == normalise(doc["expected"]))
    return {"accuracy": right, f"accuracy_{kind(doc['expected'])}": right}


def normalise(answer: str) -> str:
    """Lower case, without surrounding space and without a full stop at the end."""
    return answer.strip().lower().removesuffix(".").rstrip()


def kind(expected: str) -> str:
    """Which of ``KINDS`` a question with the answer ``expected`` is."""
    if expected in ("yes", "no"):
        return "yes_no"
    return "shape" if expected in _SHAPES else "color"


def png(image_id: str) -> bytes:
    """The encoded test image ``image_id``."""
    return _paths()[int(image_id)].read_bytes()


@lru_cache(maxsize=1)
def _paths() -> dict[int, Path]:
    import easy_vqa

    return {id: Path(path) for id, path in easy_vqa.get_test_image_paths().items()}


@lru_cache(maxsize=1000)
def _image(image_id: str) -> Image.Image:
    with Image.open(_paths()[int(image_id)]) as image:
        return image.convert("RGB")


def _load(**_: Any) -> dict[str, Any]:
    """The split as lm-eval wants it; it adds keyword arguments of its own, which are of no use here."""
    import easy_vqa
    from datasets import Dataset

    rows = [
        {"id": f"{NAME}-{number}", "image_id": str(image), "question": question, "expected": answer}
        for number, (question, answer, image) in enumerate(zip(*easy_vqa.get_test_questions(), strict=True))
    ]
    return {SPLIT: Dataset.from_list(rows)}
