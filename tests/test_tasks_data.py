"""Data that cannot be used: named by file and field, counted and left out one by one, refused when they are many."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
from benchmark_data import write
from benchmark_files import picture, write_parquet
from lm_eval.tasks import TaskManager
from PIL import Image

from matvlm.evaluate import tasks


def build(name: str, root: Path | str) -> Any:
    return tasks.build([name], {name: str(root)})[name]


def pope_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "question_id": str(n),
            "category": "random",
            "image_source": f"COCO_{n}",
            "question": f"Is there a {n}?",
            "answer": "no",
            "image": picture(n % 5),
        }
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"image": None}, "image 0 is empty"),
        ({"image": b"no image"}, "image 0: is no image, or a damaged one"),
        ({"image": picture(3)[:400]}, "image 0: is no image, or a damaged one"),
        ({"image": picture(3, "PNG")[:400]}, "image 0: is no image, or a damaged one"),
        ({"question": " "}, "question is empty"),
        ({"answer": ""}, "answer: is '', not yes or no"),
        ({"category": "other"}, "category: is 'other', not one of random, popular, adversarial"),
        ({"question": "What is <image>?"}, "holds the mark <image>"),
        ({"question_id": "1"}, "id 'pope-random-1' is there twice"),
        ({"answer": None}, "is empty: answer"),
        ({"question": None}, "question is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_question_is_counted_and_left_out(
    changes: dict[str, Any], complaint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pope_rows(100)
    rows[7] |= changes
    write_parquet(rows, tmp_path / "data" / "test-00000-of-00001.parquet")
    with caplog.at_level(logging.WARNING, logger="matvlm.tasks"):
        task = build("pope", tmp_path)
    assert len(task.eval_docs) == 99
    (reason,) = task.config.metadata["data"]["left_out"]
    assert reason.startswith("row 7: ")
    assert complaint in reason
    assert f"{tmp_path}: left out: {reason}" in caplog.text
    assert "1 of 100 questions cannot be used and are left out" in caplog.text


def test_many_bad_questions_are_refused(tmp_path: Path) -> None:
    rows = pope_rows(100)
    for n in (3, 4):
        rows[n]["image"] = None
    write_parquet(rows, tmp_path / "test-00000-of-00001.parquet")
    complaint = r"2 of 100 questions cannot be used, more than max_bad_share=0.01; the first: row 3: image 0 is empty"
    with pytest.raises(ValueError, match=complaint):
        build("pope", tmp_path)


FILES = {
    "pope": "coco/coco_pope_random.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "vqav2_val": "v2_mscoco_val2014_annotations.json",
    "gqa": "testdev_balanced_questions.json",
    "mme": "MME_Benchmark_release_version/color/000000006040.txt",
    "mmbench_en_dev": "mmbench_dev_20230712.tsv",
    "mmvet": "mm-vet.json",
    "scienceqa_img": "problems.json",
}


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("pope", '"label"', '"lable"', "row 0: is empty: answer"),
        ("pope", "{", "{{", "coco_pope_random.json, line 1: malformed JSON"),
        ("textvqa", '"answers"', '"answer"', "row 0: there is no 'answers'"),
        ("textvqa", '"data"', '"date"', "not as expected: KeyError.'data'"),
        ("vqav2_val", '"answers"', '"x"', "row 0: there is no 'answers'"),
        ("gqa", '"woman"', '""', "row 1: answer: is empty"),
        ("mme", "\tYes", "", "row 0: answer: is '', not yes or no"),
        ("mmbench_en_dev", "\tanswer\t", "\tx\t", "row 0: there is no 'answer'"),
        ("mmbench_en_dev", "\t241\n", "\t9\n", "row 1: image: '9' is neither base64 nor the index of a row"),
        ("mmvet", '"spat"', '"space"', "row 1: capability: 'space' is not one of rec, ocr"),
        ("scienceqa_img", '"answer": 4', '"answer": 9', "row 2: choices, answer: 9 must be the number of one of 5"),
    ],
)
def test_a_wrong_field_is_named(name: str, old: str, new: str, complaint: str, tmp_path: Path) -> None:
    path = write(name, tmp_path, "original") / FILES[name]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=complaint) as refused:
        build(name, tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "removed", "complaint"),
    [
        (
            "pope",
            "coco/coco_pope_popular.json",
            "neither split 'test' of the data set POPE .*: there is no coco_pope_popular.json",
        ),
        ("pope", "val2014/*1.jpg", "row 0: image file .*000001.jpg is missing"),
        ("textvqa_ocr", "TextVQA_Rosetta*", "there is no TextVQA_Rosetta_OCR_v0.2_val.json"),
        ("mmvet", "images/v1_0.png", "row 0: image file .*v1_0.png is missing"),
    ],
)
def test_a_missing_file_is_named(name: str, removed: str, complaint: str, tmp_path: Path) -> None:
    (found,) = write(name, tmp_path, "original").glob(removed)
    found.unlink()
    with pytest.raises(ValueError, match=complaint) as refused:
        build(name, tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("name", sorted({*tasks.NAMES} - {"easyvqa", "easyvqa_sentence", "python_docs"}))
def test_an_empty_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: holds neither split .* nor the benchmark's own files"):
        build(name, tmp_path)


def test_missing_columns_and_folders_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in pope_rows(3)]
    write_parquet(rows, tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="has no column 'answer', only question_id, category, image_source"):
        build("pope", tmp_path)
    with pytest.raises(ValueError, match="absent: no such folder"):
        build("pope", tmp_path / "absent")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="bad: cannot open split 'test' of this data set"):
        build("pope", tmp_path / "bad")
    with pytest.raises(ValueError, match="unknown task 'mmme'; known are easyvqa, easyvqa_sentence, gqa"):
        tasks.build(["mmme"])


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is out of reach here, as the message says together with what would help."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"some-org/MME: cannot open split 'test' .* on the hub: .*data_root.*hub_org"):
        tasks.build(["mme"], hub_org="some-org")


def test_a_missing_gqa_image_is_named(tmp_path: Path) -> None:
    write("gqa", tmp_path)
    images = tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    write_parquet([{"id": "n235859", "image": picture(1)}], images)
    with pytest.raises(ValueError, match=r"2 of 3 questions cannot be used.* row 0: image 0 is empty"):
        build("gqa", tmp_path)


def test_images_are_decoded_late_and_not_kept(tmp_path: Path) -> None:
    """Images are looked at when data are read, decoded when they are asked for, and let go of."""
    task = build("pope", write("pope", tmp_path, "original"))
    image = task.doc_to_image(task.eval_docs[0])[0]
    assert image._im is None
    path = tmp_path / "val2014" / "COCO_val2014_000000000001.jpg"
    with Image.open(path) as opened:
        expected = opened.convert("RGB")
    assert image.encoded() == path.read_bytes()
    assert image.size == expected.size
    assert image.mode == "RGB"
    for same in (image.convert("RGB"), image.copy(), image.crop((0, 0, *image.size))):
        assert same.tobytes() == expected.tobytes()
    assert image.resize((7, 9)).tobytes() == expected.resize((7, 9)).tobytes()
    assert pickle.loads(pickle.dumps(image)).tobytes() == expected.tobytes()
    assert (numpy.asarray(image) == numpy.asarray(expected)).all()
    assert image._im is None
    other = task.doc_to_image(task.eval_docs[2])[0]
    path.with_name("COCO_val2014_000000000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"000002.jpg: the image cannot be read"):
        other.convert("RGB")


def test_documents_say_where_they_are_from(tmp_path: Path) -> None:
    """The hash is of what is asked and expected, wherever it lies, and changes with an answer."""
    hashes = []
    for place in ("one", "two"):
        task = build("gqa", write("gqa", tmp_path / place, "original"))
        origin = task.config.metadata["data"]
        assert {**origin, "sha256": ""} == {
            "source": str(tmp_path / place),
            "questions": 3,
            "left_out": [],
            "sha256": "",
        }
        hashes.append(origin["sha256"])
    path = tmp_path / "one" / "testdev_balanced_questions.json"
    questions = json.loads(path.read_text())
    questions["201307251"]["answer"] = "yes"
    path.write_text(json.dumps(questions))
    hashes.append(build("gqa", tmp_path / "one").config.metadata["data"]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_lm_evals_metadata_names_one_folder_and_a_share(tmp_path: Path) -> None:
    rows = pope_rows(10)
    rows[2]["answer"] = "perhaps"
    write_parquet(rows, tmp_path / "test-0.parquet")
    metadata: Any = {"data_root": str(tmp_path), "max_bad_share": 0.2}
    manager = TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata)
    assert len(manager.load(["pope"])["tasks"]["pope"].eval_docs) == 9
    metadata["max_bad_share"] = 0.05
    with pytest.raises(ValueError, match=r"1 of 10 questions cannot be used, more than max_bad_share=0\.05"):
        TaskManager(include_path=str(tasks.FOLDER), include_defaults=False, metadata=metadata).load(["pope"])


def test_two_data_sets_of_a_task_do_not_mix(tmp_path: Path) -> None:
    write_parquet(pope_rows(3), tmp_path / "a" / "test-0.parquet")
    write_parquet([row | {"image": picture(77)} for row in pope_rows(3)], tmp_path / "b" / "test-0.parquet")
    first, second = build("pope", tmp_path / "a"), build("pope", tmp_path / "b")
    pixels = [task.doc_to_image(task.eval_docs[0])[0].tobytes() for task in (first, second)]
    assert pixels[0] != pixels[1]
