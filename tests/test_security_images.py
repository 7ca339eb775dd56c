"""Images and their names come from outside: they stay below their folder, and neither run nor fill the memory."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import tiny_chat
from PIL import Image

from matvlm.chat.speaker import as_image
from matvlm.config import Data
from matvlm.data.images import ImageFolder
from matvlm.data.prepare import open_dataset, prepare
from matvlm.data.rows import BadSample
from matvlm.evaluate.tasks.data import BenchmarkError, load
from matvlm.evaluate.tasks.pope import scorer as pope

OUTSIDE = "image outside its folder"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """``images/inside.png``, and ``secret.png`` beside that folder, to which ``images/link.png`` leads."""
    place = tmp_path / "images"
    place.mkdir()
    for path in (place / "inside.png", tmp_path / "secret.png"):
        tiny_chat.picture().save(path)
    (place / "link.png").symlink_to(tmp_path / "secret.png")
    return place


def sample(image: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a circle"}]
    return {"image": image, "conversations": turns}


def test_an_image_that_a_sample_names_is_below_the_image_folder(images: Path, tmp_path: Path) -> None:
    """Whoever made the folder may link to another place from there, as many do to data sets they share."""
    good = ["inside.png", "./inside.png", "sub/../inside.png", str(images / "inside.png"), "link.png"]
    bad = ["../secret.png", "sub/../../secret.png", str(images.parent / "secret.png"), "/etc/passwd", "../images"]
    (tmp_path / "data.json").write_text(json.dumps([sample(name) for name in (*good, *bad[:-1])]))
    data = Data(source="llava", path=str(tmp_path / "data.json"), image_folder=str(images), max_bad_share=0.9)
    made = prepare(data, 0, tmp_path / "prepared")
    assert (made.num_samples, made.skipped) == (len(good), {OUTSIDE: len(bad) - 1})
    assert {row["image"].size for row in open_dataset(made)} == {(16, 16)}
    with pytest.raises(BadSample, match=rf"{OUTSIDE}: x: '\.\./secret\.png' leads out of .* \(data\.image_folder\)"):
        ImageFolder(str(images)).find("../secret.png", "x")
    assert ImageFolder(str(images)).find(str(images / "link.png"), "x")["path"] == str(images / "link.png")


def test_an_image_that_a_sample_names_is_below_the_folder_in_the_bucket(bucket: str) -> None:
    found = ImageFolder(f"{bucket}/images")
    assert found.find("a/../b.png", "x")["path"] == f"{bucket}/images/b.png"
    assert found.find("/b.png", "x")["path"] == f"{bucket}/images/b.png"
    for name in ("../secret.png", "a/../../secret.png", "/../secret.png", ".."):
        with pytest.raises(BadSample, match=OUTSIDE):
            found.find(name, "x")


def test_a_link_in_an_archive_is_no_image(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images / "inside.png", "../../inside.png")
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
    before = set(tmp_path.rglob("*"))
    found = ImageFolder(str(tmp_path / "images.tar"))
    assert found.find("../../inside.png", "x")["path"].startswith("tar:")
    for name in ("link.png", "hard.png"):
        with pytest.raises(BadSample, match="missing image"):
            found.find(name, "x")
    assert set(tmp_path.rglob("*")) == before


def parquet(rows: dict[str, list[Any]], path: Path) -> None:
    """With images that are paths, as ``datasets`` itself never writes them."""
    import datasets
    import pyarrow.parquet

    features = {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({name: features[name] for name in rows}))
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(made.with_format("arrow")[:], path)


def test_an_image_path_in_a_data_set_is_below_its_folder(images: Path, tmp_path: Path) -> None:
    place = tmp_path / "set"
    shutil.copytree(images, place / "images")
    secret = str(tmp_path / "secret.png")
    paths = [str(place / "images/inside.png"), secret, f"{place}/../secret.png", f'tar:["{secret}", 0, 99, "a"]']
    rows = {"question": ["what"] * 4, "answer": ["circle"] * 4, "image": [{"bytes": None, "path": p} for p in paths]}
    parquet(rows, place / "data" / "train-0.parquet")
    made = prepare(Data(source="datasets", path=str(place), max_bad_share=0.9), 0, tmp_path / "prepared")
    assert (made.num_samples, made.skipped) == (1, {OUTSIDE: 3})


def test_an_image_that_a_benchmark_names_is_below_its_folder(images: Path, tmp_path: Path) -> None:
    place = tmp_path / "pope"
    shutil.copytree(images, place / "val2014")
    for split in pope.SPLITS:
        names = ["inside.png", "../../secret.png", "/etc/passwd", str(tmp_path / "secret.png")]
        lines = [{"question_id": n, "image": name, "text": "?", "label": "yes"} for n, name in enumerate(names)]
        (place / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {"name": "pope", "hub": "POPE", "split": "test", "columns": ["question"]}
    settings |= {"document": pope.document, "original": pope.original, "data_root": str(place)}
    found = load(**settings, max_bad_share=0.9)["test"]
    assert {Path(doc["images"][0]).name for doc in found} == {"inside.png"}
    assert len(found) == len(pope.SPLITS)
    with pytest.raises(BenchmarkError, match="is not in the folder of these data"):
        load(**settings)


def png(width: int, height: int) -> bytes:
    """A few bytes that claim to be ``width x height`` pixels of white."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + width // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_small_file_that_would_fill_the_memory_is_one_bad_sample(images: Path, tmp_path: Path) -> None:
    bomb = png(16_000, 16_000)
    assert len(bomb) < 64 << 10
    with pytest.raises(ValueError, match=r"^upload\.png: no image, or a damaged one"):
        as_image(bomb, "upload.png")
    (images / "bomb.png").write_bytes(bomb)
    (tmp_path / "data.json").write_text(json.dumps([sample("inside.png"), sample("bomb.png")]))
    data = Data(source="llava", path=str(tmp_path / "data.json"), image_folder=str(images), max_bad_share=0.5)
    assert prepare(data, 0, tmp_path / "prepared").skipped == {"broken image": 1}


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    ghostscript.chmod(ghostscript.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    drawing = io.BytesIO()
    tiny_chat.picture().save(drawing, "EPS")
    with pytest.raises(ValueError, match=r"^upload\.eps: no image"):
        as_image(drawing.getvalue(), "upload.eps")
    assert Image.open(drawing).format == "EPS"
    assert not (tmp_path / "ran").exists()
