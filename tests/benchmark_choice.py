"""Small data sets of the benchmarks with yes or no and multiple choice, each on the hub and from its authors."""

from __future__ import annotations

import base64
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_files import picture, write_image, write_json, write_parquet

MME = [
    ("color", "000000006040.jpg", "Is there a red coat in the image?", "Yes"),
    ("color", "000000006040.jpg", "Is there a yellow coat in the image?", "No"),
    ("color", "000000012120.jpg", "Is there a red couch in the image?", "Yes"),
    ("color", "000000012120.jpg", "Is there a black couch in the image?", "No"),
    ("artwork", "11411.jpg", "Does this artwork exist in the form of painting?", "Yes"),
    ("artwork", "11411.jpg", "Does this artwork exist in the form of glassware?", "No"),
    ("code_reasoning", "0020.png", "Is a python code shown in the picture?", "Yes"),
    ("code_reasoning", "0020.png", "Is a c++ code shown in the picture?", "No"),
]
"""Category, image, question, answer."""
MME_CATEGORIES = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)


def mme_picture(image: str) -> bytes:
    return picture(len(image) + int(image[3]), "PNG" if image.endswith("png") else "JPEG")


def _mme_hub(folder: Path) -> None:
    rows = [
        {
            "question_id": f"{category}/{image}",
            "image": mme_picture(image),
            "question": f"{question} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category, image, question, answer in MME
    ]
    write_parquet(rows, folder / "data" / "test-00000-of-00001.parquet")


def _mme_original(folder: Path) -> None:
    top = folder / "MME_Benchmark_release_version"
    for category in MME_CATEGORIES:
        (top / category).mkdir(parents=True)
    for category, image, question, answer in MME:
        apart = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        images, texts = ("images", "questions_answers_YN") if apart else ("", "")
        text = top / category / texts / f"{Path(image).stem}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        with open(text, "a") as file:
            file.write(f"{question} Please answer yes or no.\t{answer}\n")
        write_image(mme_picture(image), top / category / images / image)


MMBENCH = [
    (
        241,
        "Identify the colony shown.",
        "Here is a map.",
        ["Maryland", "New Hampshire", "Rhode Island", "Vermont"],
        "A",
    ),
    (
        1_000_241,
        "Identify the colony shown.",
        "Here is a map.",
        ["Vermont", "Maryland", "New Hampshire", "Rhode Island"],
        "B",
    ),
    (
        2_000_241,
        "Identify the colony shown.",
        "Here is a map.",
        ["Rhode Island", "Vermont", "Maryland", "New Hampshire"],
        "C",
    ),
    (
        3_000_241,
        "Identify the colony shown.",
        "Here is a map.",
        ["New Hampshire", "Rhode Island", "Vermont", "Maryland"],
        "D",
    ),
    (252, "Which is true?", None, ["warm", "cold", None, None], "B"),
    (1_000_252, "Which is true?", None, ["cold", "warm", None, None], "A"),
]
"""Index, question, hint, options, answer; the indices from a million on are orders of a question's options."""


def _mmbench_rows(nothing: Any, answer: bool) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            "question": question,
            "hint": nothing if hint is None else hint,
            **{letter: nothing if text is None else text for letter, text in zip("ABCD", options, strict=True)},
            **({"answer": right} if answer else {}),
            "category": "identity_reasoning",
            "source": "scienceqa",
            "l2-category": "attribute_reasoning",
            "comment": nothing,
            "split": "dev" if answer else "test",
        }
        for index, question, hint, options, right in MMBENCH
    ]


def _mmbench_hub(split: str) -> Callable[[Path], None]:
    def write_split(folder: Path) -> None:
        rows = [row | {"image": picture(row["index"] % 1000)} for row in _mmbench_rows("nan", split == "dev")]
        write_parquet(rows, folder / "en" / f"{split}-00000-of-00001.parquet")

    return write_split


def _mmbench_original(name: str, answer: bool) -> Callable[[Path], None]:
    def write_table(folder: Path) -> None:
        rows = _mmbench_rows("", answer)
        for row in rows:
            first = row["index"] < 1_000_000
            content = base64.b64encode(picture(row["index"] % 1000)).decode()
            row["image"] = content if first else str(row["index"] % 1_000_000)
        with open(folder / name, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows(rows)

    return write_table


SCIENCEQA = [
    ("5", "What is the capital?", ["Albany", "Boston", "Dover"], 1, "", True),
    ("11", "Which is colder?", ["the ice", "the tea"], 0, "Look at the thermometers.", True),
    ("12", "Which word is a noun?", ["run", "dog"], 1, "", False),
    ("19", "Which trait is shown?", ["long legs", "a beak", "fur", "scales", "gills"], 4, "", True),
]
"""Id, question, choices, the number of the right one, hint, whether it has an image."""


def _scienceqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "question": question,
            "choices": choices,
            "answer": answer,
            "hint": hint,
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
            "image": image,
        }
        for _, question, choices, answer, hint, image in SCIENCEQA
    ]


def _scienceqa_hub(folder: Path) -> None:
    rows = [
        row | {"image": picture(int(id), "PNG")}
        for (id, *_), row in zip(SCIENCEQA, _scienceqa_rows(), strict=True)
        if row["image"]
    ]
    write_parquet(rows, folder / "ScienceQA-IMG" / "test-00000-of-00001.parquet")


def _scienceqa_original(folder: Path) -> None:
    problems = {
        id: row | {"image": "image.png" if row["image"] else None, "split": "test"}
        for (id, *_), row in zip(SCIENCEQA, _scienceqa_rows(), strict=True)
    }
    write_json(problems, folder / "problems.json")
    write_json({"train": [], "test": [id for id, *_ in SCIENCEQA]}, folder / "pid_splits.json")
    for id, row in problems.items():
        if row["image"]:
            write_image(picture(int(id), "PNG"), folder / "images" / "test" / id / "image.png")


MULTIPLE = "multiple-choice"
MMMU = [
    ("validation_Accounting_1", "<image 1> What is the total?", "['$6', '$7', '$8', '$9']", "B", MULTIPLE, 1),
    ("validation_Art_2", "Compare <image 1> with <image 2> and <image 1>.", "['a cat', 'a dog']", "A", MULTIPLE, 2),
    ("validation_Math_3", "How long is the side in <image 1>?", "[]", "3.14", "open", 1),
    ("validation_Music_4", "Which is it?", "['<image 1>', '<image 2>', '<image 3>']", "C", MULTIPLE, 3),
]
"""Id, question, options, answer, type, how many images."""


def mmmu_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": id,
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{n}": picture(100 * row + n, "PNG") if n <= images else None for n in range(1, 8)},
            "img_type": "['Tables']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": "any",
        }
        for row, (id, question, options, answer, kind, images) in enumerate(MMMU)
    ]


def _mmmu_hub(folder: Path) -> None:
    columns = tuple(f"image_{n}" for n in range(1, 8))
    for row in mmmu_rows():
        subject = row["id"].split("_")[1]
        write_parquet([row], folder / subject / "validation-00000-of-00001.parquet", columns)


WRITERS: dict[tuple[str, str], Callable[[Path], None]] = {
    ("mme", "hub"): _mme_hub,
    ("mme", "original"): _mme_original,
    ("mmbench_en_dev", "hub"): _mmbench_hub("dev"),
    ("mmbench_en_dev", "original"): _mmbench_original("mmbench_dev_20230712.tsv", True),
    ("mmbench_en_test", "hub"): _mmbench_hub("test"),
    ("mmbench_en_test", "original"): _mmbench_original("mmbench_test_en_20231003.tsv", False),
    ("scienceqa_img", "hub"): _scienceqa_hub,
    ("scienceqa_img", "original"): _scienceqa_original,
    ("mmmu", "hub"): _mmmu_hub,
}
