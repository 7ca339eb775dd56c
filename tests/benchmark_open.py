"""Small data sets of the benchmarks with short or free answers, each as its hub data set and as its authors' files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark_files import PIXELS, picture, write_image, write_json, write_lines, write_parquet

POPE = [
    ("random", 1, "COCO_val2014_000000000001", "Is there a snowboard in the image?", "yes"),
    ("random", 2, "COCO_val2014_000000000001", "Is there a dog in the image?", "no"),
    ("random", 3, "COCO_val2014_000000000002", "Is there a cat in the image?", "yes"),
    ("random", 4, "COCO_val2014_000000000002", "Is there a bus in the image?", "no"),
    ("popular", 1, "COCO_val2014_000000000001", "Is there a snowboard in the image?", "yes"),
    ("popular", 2, "COCO_val2014_000000000001", "Is there a person in the image?", "no"),
    ("adversarial", 1, "COCO_val2014_000000000001", "Is there a snowboard in the image?", "yes"),
    ("adversarial", 2, "COCO_val2014_000000000001", "Is there a ski in the image?", "no"),
]
"""Split, question id, image, question, answer."""


def _pope_hub(folder: Path) -> None:
    names = ("category", "question_id", "image_source", "question", "answer")
    rows = [
        dict(zip(names, row, strict=True))
        | {"id": str(n), "question_id": str(row[1]), "image": picture(int(row[2][-1]))}
        for n, row in enumerate(POPE)
    ]
    write_parquet(rows, folder / "data" / "test-00000-of-00001.parquet")


def _pope_original(folder: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question_id": id, "image": f"{image}.jpg", "text": question, "label": answer}
            for of, id, image, question, answer in POPE
            if of == split
        ]
        write_lines(lines, folder / "coco" / f"coco_pope_{split}.json")
    for number in (1, 2):
        write_image(picture(number), folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")


VQAV2 = [
    (1001, 1, "What color is the cat?", ["black"] * 6 + ["dark"] * 3 + ["Black."], "black", "other"),
    (1002, 1, "How many cats are there?", ["2"] * 10, "2", "number"),
    (1003, 2, "Is it sunny?", ["yes"] * 8 + ["no", "no"], "yes", "yes/no"),
    (1004, 2, "What is on the table?", ["vase", "a vase", "the vase", "flowers", *["plant"] * 6], "plant", "other"),
]
"""Question id, image, question, the ten answers, the most frequent one, type of answer."""


def _vqav2_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_type": "what",
            "multiple_choice_answer": best,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n}
                for n, answer in enumerate(answers, start=1)
            ],
            "image_id": image,
            "answer_type": kind,
            "question_id": id,
            "question": question,
        }
        for id, image, question, answers, best, kind in VQAV2
    ]


def _vqav2_hub(split: str) -> Callable[[Path], None]:
    def write_split(folder: Path) -> None:
        rows = [row | {"image": picture(row["image_id"])} for row in _vqav2_rows()]
        write_parquet(rows, folder / "data" / f"{split}-00000-of-00001.parquet")

    return write_split


def _vqav2_original(folder: Path) -> None:
    rows = _vqav2_rows()
    asked = [{name: row[name] for name in ("image_id", "question", "question_id")} for row in rows]
    write_json({"questions": asked}, folder / "v2_OpenEnded_mscoco_val2014_questions.json")
    annotations = [{name: value for name, value in row.items() if name != "question"} for row in rows]
    write_json({"annotations": annotations}, folder / "v2_mscoco_val2014_annotations.json")
    for number in (1, 2):
        write_image(picture(number), folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")


def _vqav2_testdev_original(folder: Path) -> None:
    asked = [{name: row[name] for name in ("image_id", "question", "question_id")} for row in _vqav2_rows()]
    write_json({"questions": asked}, folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    _testdev_images(folder)


def _vqav2_testdev_llava(folder: Path) -> None:
    lines = [
        {
            "question_id": row["question_id"],
            "image": f"COCO_test2015_{row['image_id']:012d}.jpg",
            "text": f"{row['question']}\nAnswer the question using a single word or phrase.",
            "category": "default",
        }
        for row in _vqav2_rows()
    ]
    write_lines(lines, folder / "llava_vqav2_mscoco_test-dev2015.jsonl")
    _testdev_images(folder)


def _testdev_images(folder: Path) -> None:
    for number in (1, 2):
        write_image(picture(number), folder / "test2015" / f"COCO_test2015_{number:012d}.jpg")


TEXTVQA = [
    (
        34602,
        "003a8ae2ef43b901",
        "what is the brand of this camera?",
        ["nous les gosses", "dakota"] + ["dakota"] * 7 + ["clos culombu"],
    ),
    (34603, "0054c91397f2fe05", "what does the small white text spell?", ["copenhagen"] * 9 + ["thursday"]),
    (34604, "0054c91397f2fe05", "how much is it?", ["$1.50"] * 3 + ["1.50"] * 7),
]
"""Question id, image, question, answers."""
TEXTVQA_OCR = {"003a8ae2ef43b901": ["DAKOTA", "DIGITAL"], "0054c91397f2fe05": []}


def _textvqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "question_id": id,
            "question": question,
            "question_tokens": question.split(),
            "image_width": PIXELS,
            "image_height": PIXELS,
            "answers": answers,
            "image_classes": ["Camera"],
            "set_name": "val",
        }
        for id, image, question, answers in TEXTVQA
    ]


def _textvqa_hub(folder: Path) -> None:
    rows = [
        row | {"ocr_tokens": TEXTVQA_OCR[row["image_id"]], "image": picture(int(row["image_id"][-2:]))}
        for row in _textvqa_rows()
    ]
    write_parquet(rows, folder / "data" / "validation-00000-of-00001.parquet")


def _textvqa_original(folder: Path) -> None:
    write_json({"dataset_type": "val", "data": _textvqa_rows()}, folder / "TextVQA_0.5.1_val.json")
    read = [{"image_id": image, "ocr_tokens": tokens, "ocr_info": []} for image, tokens in TEXTVQA_OCR.items()]
    write_json({"dataset_type": "val", "data": read}, folder / "TextVQA_Rosetta_OCR_v0.2_val.json")
    for image in TEXTVQA_OCR:
        write_image(picture(int(image[-2:])), folder / "train_images" / f"{image}.jpg")


GQA = [
    ("201307251", "n161313", "Is it overcast?", "no"),
    ("201640614", "n161313", "Who is wearing the dress?", "woman"),
    ("202225914", "n235859", "What is in front of the fence?", "gate"),
]
"""Question id, image, question, answer."""


def _gqa_rows() -> dict[str, dict[str, Any]]:
    return {
        id: {"imageId": image, "question": question, "answer": answer, "fullAnswer": f"{answer}.", "isBalanced": True}
        for id, image, question, answer in GQA
    }


def _gqa_hub(folder: Path) -> None:
    rows = [{"id": id, **row} for id, row in _gqa_rows().items()]
    write_parquet(rows, folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", ())
    images = [{"id": id, "image": picture(int(id[-1]))} for id in ("n235859", "n161313")]
    write_parquet(images, folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")


def _gqa_original(folder: Path) -> None:
    write_json(_gqa_rows(), folder / "testdev_balanced_questions.json")
    for id in ("n235859", "n161313"):
        write_image(picture(int(id[-1])), folder / "images" / f"{id}.jpg")


MMVET = [
    ("v1_0", "v1_0.png", "What is x in the equation?", "-1 <AND> -5", ["ocr", "math"]),
    ("v1_1", "v1_1.jpg", "Which room is bigger?", "the left <OR> the left one", ["rec", "spat"]),
    ("v1_2", "v1_1.jpg", "What is the animal?", "a cat", ["rec"]),
]
"""Question id, image, question, answer, capabilities."""


def _mmvet_picture(name: str) -> bytes:
    return picture(int(name[3]), "PNG" if name.endswith("png") else "JPEG")


def _mmvet_hub(folder: Path) -> None:
    rows = [
        {
            "question_id": id,
            "image": _mmvet_picture(image),
            "question": question,
            "answer": answer,
            "image_source": "common sense",
            "capability": ",".join(capabilities),
        }
        for id, image, question, answer, capabilities in MMVET
    ]
    write_parquet(rows, folder / "data" / "test-00000-of-00001.parquet")


def _mmvet_original(folder: Path) -> None:
    questions = {
        id: {"imagename": image, "question": question, "answer": answer, "imagesource": "x", "capability": capabilities}
        for id, image, question, answer, capabilities in MMVET
    }
    write_json(questions, folder / "mm-vet.json")
    for _, image, *_ in MMVET:
        write_image(_mmvet_picture(image), folder / "images" / image)


WRITERS: dict[tuple[str, str], Callable[[Path], None]] = {
    ("pope", "hub"): _pope_hub,
    ("pope", "original"): _pope_original,
    ("vqav2_val", "hub"): _vqav2_hub("validation"),
    ("vqav2_val", "original"): _vqav2_original,
    ("vqav2_testdev", "hub"): _vqav2_hub("testdev"),
    ("vqav2_testdev", "original"): _vqav2_testdev_original,
    ("vqav2_testdev", "llava"): _vqav2_testdev_llava,
    ("textvqa", "hub"): _textvqa_hub,
    ("textvqa", "original"): _textvqa_original,
    ("textvqa_ocr", "hub"): _textvqa_hub,
    ("textvqa_ocr", "original"): _textvqa_original,
    ("gqa", "hub"): _gqa_hub,
    ("gqa", "original"): _gqa_original,
    ("mmvet", "hub"): _mmvet_hub,
    ("mmvet", "original"): _mmvet_original,
}
