"""Data of the ``datasets`` library, from folders as they come: parquet, images with metadata, JSON lines, Arrow."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from matvlm.config import Data
from matvlm.data.prepare import open_dataset, prepare, turns_of
from matvlm.data.rows import DataError
from matvlm.recipes import RecipeError, parse_recipe

TALK = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "red"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def image(color: str = "red") -> Image.Image:
    return Image.new("RGB", (8, 8), color)


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    image(color).save(file, "PNG")
    return file.getvalue()


def rows_of(folder: Path, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    manifest = prepare(Data(source="datasets", path=str(folder), **settings), 0, folder.parent / "out")
    return list(open_dataset(manifest)), manifest.skipped


def parquet(folder: Path, columns: dict[str, list[Any]], split: str = "train") -> Path:
    """With images inside, as on the hub."""
    folder.mkdir(exist_ok=True)
    made = datasets.Dataset.from_dict(columns)
    made.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_parquet_with_conversations(tmp_path: Path) -> None:
    text_only = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    folder = parquet(
        tmp_path / "set",
        {
            "id": ["one", "two", "three"],
            "image": [image(), None, image("blue")],
            "conversations": [TALK, text_only, [*TALK, *text_only]],
        },
    )
    rows, skipped = rows_of(folder, max_bad_share=0.0)
    assert [row["id"] for row in rows] == ["one-0", "three-2"]
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (0, 0, 255)]
    assert turns_of(rows[1]) == [("what", "red"), ("hello", "hi")]
    assert skipped == {"text only": 1}


def test_questions_with_answers_under_other_names_in_another_split(tmp_path: Path) -> None:
    folder = parquet(
        tmp_path / "set", {"picture": [image()] * 2, "query": ["q", "r"], "label": [["a", "b"], []]}, "validation"
    )
    columns = {"image": "picture", "question": "query", "answer": "label"}
    rows, skipped = rows_of(folder, split="validation", columns=columns, max_bad_share=0.5)
    assert [turns_of(row) for row in rows] == [[("q", "a")]]
    assert [row["id"] for row in rows] == ["sample-0"]
    assert skipped == {"malformed entry": 1}, "a question without any answer"


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / "train" / f"{name}.png").write_bytes(png())
    lines = [{"file_name": f"{name}.png", "question": f"q {name}", "answer": "x"} for name in ("a", "b")]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, _ = rows_of(folder)
    assert sorted(turns_of(row)[0].question for row in rows) == ["q a", "q b"]
    assert rows[0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_json_lines_that_name_images(tmp_path: Path) -> None:
    folder, images = tmp_path / "set", tmp_path / "images"
    folder.mkdir()
    images.mkdir()
    (images / "a.png").write_bytes(png("blue"))
    lines = [{"image": name, "conversations": TALK} for name in ("a.png", "absent.png")]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, skipped = rows_of(folder, image_folder=str(images), max_bad_share=0.5)
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(0, 0, 255)]
    assert skipped == {"missing image": 1}


def test_a_saved_data_set_and_raw_bytes(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": [png(), b"no image"], "conversations": [TALK] * 2})
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "set"))
    rows, skipped = rows_of(tmp_path / "set", max_bad_share=0.5)
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(255, 0, 0)]
    assert skipped == {"broken image": 1}


def test_the_content_alone_decides_the_fingerprint(tmp_path: Path) -> None:
    def fingerprint(color: str, name: str) -> str:
        made = datasets.Dataset.from_dict({"image": [png(color)], "conversations": [TALK]})
        made.save_to_disk(str(tmp_path / name))
        return prepare(Data(source="datasets", path=str(tmp_path / name)), 0, tmp_path / f"{name}-out").fingerprint

    assert fingerprint("red", "a") == fingerprint("red", "b") != fingerprint("blue", "c")


@pytest.mark.parametrize(
    ("columns", "settings", "complaint"),
    [
        ({"image": [None]}, {}, r"has no column 'question', 'answer', only image"),
        ({"picture": [image()], "conversations": [TALK]}, {}, r"no column 'image', only picture, conversations"),
        ({"image": [image()], "conversations": [TALK]}, {"columns": {"id": "key"}}, r"has no column 'key'"),
        ({"image": [image()], "conversations": [TALK]}, {"split": "test"}, r"cannot open this data set .*'test'"),
        ({"image": [[image()]], "conversations": [TALK]}, {}, r"column 'image' must be one image, its bytes or"),
        ({"image": [7], "conversations": [TALK]}, {}, r"column 'image' must be one image, its bytes or"),
    ],
)
def test_data_of_another_shape_are_refused(
    tmp_path: Path, columns: dict[str, Any], settings: dict[str, Any], complaint: str
) -> None:
    folder = parquet(tmp_path / "set", columns)
    with pytest.raises(DataError, match=rf"^{folder}: .*{complaint}"):
        rows_of(folder, **settings)
    assert not (tmp_path / "out").exists()


def test_a_place_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/absent: no such folder \(data\.path\)"):
        rows_of(tmp_path / "absent")
    (tmp_path / "file.parquet").touch()
    with pytest.raises(DataError, match=r"file\.parquet: is a file"):
        rows_of(tmp_path / "file.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty: cannot open this data set"):
        rows_of(tmp_path / "empty")
    with pytest.raises(DataError, match=r"^nobody/nothing: cannot open this data set .*data\.name 'x'"):
        prepare(Data(source="datasets", path="nobody/nothing", name="x"), 0, tmp_path / "out")


def test_code_beside_the_data_is_not_run(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", {"image": [image()], "conversations": [TALK]})
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with contextlib.suppress(DataError):
        rows_of(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("{source: datasets}", "needs path: a hub id or the folder"),
        ("{source: llava, path: x, split: test}", "split, name and columns are of source 'datasets'"),
        ("{source: datasets, path: x, columns: {picture: y}}", "data.columns"),
    ],
)
def test_settings_that_do_not_fit_are_refused(data: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe(f"name: x\ndata: {data}")
