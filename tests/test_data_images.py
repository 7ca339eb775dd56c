"""Images in tar archives and in S3: the right bytes without unpacking; what cannot be read that way is refused."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from s3_server import BUCKET

from matvlm.config import Data
from matvlm.data.images import ImageFolder, read_image
from matvlm.data.prepare import open_dataset, prepare
from matvlm.data.rows import BadSample, DataError
from matvlm.storage import StorageError, read_bytes, s3

COLORS = {"a.png": (255, 0, 0), "deep/b.png": (0, 255, 0), "c.png": (0, 0, 255)}


def png(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_talk(path: Path, images: list[str]) -> Path:
    talk = [{"from": "human", "value": "<image>\nwhat is it"}, {"from": "gpt", "value": "a colour"}]
    path.write_text(json.dumps([{"id": "s", "image": image, "conversations": talk} for image in images]))
    return path


def colors(data: Data, folder: Path) -> list[tuple[int, int, int]]:
    return [row["image"].getpixel((0, 0)) for row in open_dataset(prepare(data, 0, folder))]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """images-000.tar holds a.png and deep/b.png, images-001.tar holds c.png."""
    folder = tmp_path / "tars"
    write_tar(folder / "images-000.tar", {name: png(COLORS[name]) for name in ("a.png", "deep/b.png")})
    write_tar(folder / "images-001.tar", {"./c.png": png(COLORS["c.png"])})
    return folder


@pytest.fixture
def client(bucket: str) -> Any:
    """Of a server with an empty bucket."""
    return s3._client()


@pytest.mark.parametrize("place", ["", "images-{000..001}.tar", "images-*.tar", "images-00[01].tar"])
def test_members_of_archives_are_read_in_place(tmp_path: Path, shards: Path, place: str) -> None:
    names = ["c.png", "deep/b.png", "./a.png", "c.png"]
    data = Data(
        source="llava",
        path=str(write_talk(tmp_path / "talk.json", names)),
        image_folder=str(shards / place).rstrip("/"),
    )
    expected = [COLORS[name.removeprefix("./")] for name in names]
    before = sorted(path for path in tmp_path.rglob("*"))
    assert colors(data, tmp_path / "out") == expected
    left = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in [path, *path.parents]}
    assert left == set(before), "nothing is unpacked"


def test_a_folder_may_hold_archives_and_files(tmp_path: Path, shards: Path) -> None:
    (shards / "loose.png").write_bytes(png((9, 9, 9)))
    folder = ImageFolder(str(shards))
    assert read_image(folder.find("loose.png", "s"), "s") == png((9, 9, 9))
    assert read_image(folder.find("c.png", "s"), "s") == png(COLORS["c.png"])
    alone = ImageFolder(str(shards / "images-000.tar"))
    with pytest.raises(
        BadSample, match=r"missing image: s: no archive of .*images-000\.tar has the member 'loose\.png'"
    ):
        alone.find("loose.png", "s")


def test_names_in_archives_are_only_names(tmp_path: Path) -> None:
    long = "x" * 300 + ".png"  # longer than the header's field
    contents = {"/etc/a.png": b"1", "../../b.png": b"22", long: b"333", "twice": b"old", "ünïcode": b"4"}
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        for name, content in [*contents.items(), ("twice", b"newer")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    folder = ImageFolder(str(tmp_path / "odd.tar"))
    for name, content in {**contents, "twice": b"newer"}.items():
        assert read_image(folder.find(name, "s"), "s") == content
    with pytest.raises(BadSample, match="missing image"):
        folder.find("link", "s")


def test_unusable_archives_are_refused_by_name(tmp_path: Path, shards: Path) -> None:
    def refused(place: Path, complaint: str) -> None:
        with pytest.raises(DataError, match=complaint):
            ImageFolder(str(place))

    write_tar(tmp_path / "zip" / "images.tar.gz", {"a.png": b"1"}, "w:gz")
    refused(tmp_path / "zip", r"images\.tar\.gz: a compressed archive cannot be read in parts .*unpack it")
    refused(tmp_path / "zip" / "images.tar.gz", "a compressed archive")
    (tmp_path / "zip" / "images.tar.gz").rename(tmp_path / "hidden.tar")
    refused(tmp_path / "hidden.tar", r"hidden\.tar: cannot be read as an uncompressed tar")
    refused(tmp_path / "absent.tar", r"absent\.tar: cannot be read as .*No such file")
    refused(tmp_path / "none-*.tar", "no file fits this pattern")
    refused(shards / "images-{000..002}.tar", r"images-002\.tar: cannot be read")
    write_tar(shards / "more.tar", {"a.png": b"other"})
    refused(shards, r"more\.tar: member 'a\.png' is also in .*images-000\.tar")

    whole = (shards / "images-000.tar").read_bytes()
    second = whole.index(b"deep/b.png")
    for name, damaged in {
        "cut in a member": whole[: second + 600],
        "cut in a header": whole[: second + 100],
        "cut between": whole[:second],
        "bad header": whole[:second] + bytes([whole[second] ^ 1]) + whole[second + 1 :],
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(damaged)
        refused(tmp_path / f"{name}.tar", rf"{name}\.tar: cannot be read as an uncompressed tar")


def test_everything_may_be_in_s3(tmp_path: Path, shards: Path, client: Any) -> None:
    names = ["c.png", "deep/b.png", "a.png"]
    client.upload_file(str(write_talk(tmp_path / "talk.json", [*names, "absent.png"])), BUCKET, "sets/talk.json")
    for name, color in COLORS.items():
        client.put_object(Bucket=BUCKET, Key=f"loose/{name}", Body=png(color))
    for shard in shards.iterdir():
        client.upload_file(str(shard), BUCKET, f"tars/{shard.name}")
    places = [
        "s3://matvlm-test/loose",
        "s3://matvlm-test/tars/",
        "s3://matvlm-test/tars/images-{000..001}.tar",
        "s3://matvlm-test/tars/images-*.tar",
    ]
    prints = set()
    for number, place in enumerate(places):
        data = Data(source="llava", path="s3://matvlm-test/sets/talk.json", image_folder=place, max_bad_share=0.25)
        out = tmp_path / str(number)
        assert colors(data, out) == [COLORS[name] for name in names]
        manifest = prepare(data, 0, out)
        assert manifest.skipped == {"missing image": 1}
        prints.add(manifest.fingerprint)
    local = Data(source="llava", path=str(tmp_path / "talk.json"), image_folder=str(shards), max_bad_share=0.25)
    prints.add(prepare(local, 0, tmp_path / "local").fingerprint)
    assert len(prints) == 1, "what the samples are decides, not where they lie"


def test_an_archive_in_s3_is_read_by_ranges(tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matvlm.storage.BLOCK", 4096)
    contents = {f"{n}.bin": os.urandom(50_000 + n) for n in range(20)}
    write_tar(tmp_path / "big.tar", contents)
    client.upload_file(str(tmp_path / "big.tar"), BUCKET, "big.tar")
    fetched: list[int] = []
    real = s3.read

    def counting(uri: str, offset: int = 0, size: int | None = None) -> bytes:
        content = real(uri, offset, size)
        fetched.append(len(content))
        return content

    monkeypatch.setattr(s3, "read", counting)
    folder = ImageFolder("s3://matvlm-test/big.tar")
    assert sum(fetched) < 25 * 2 * 4096, "headers only, of a file of a million bytes"
    fetched.clear()
    for name, content in contents.items():
        assert read_image(folder.find(name, "s"), "s") == content
    assert fetched == [len(content) for content in contents.values()]


def test_a_broken_answer_is_asked_for_again(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ResponseStreamingError

    client.put_object(Bucket=BUCKET, Key="x", Body=b"content")
    real, failures = client.get_object, []

    class Torn:
        def read(self) -> bytes:
            failures.append(1)
            raise ResponseStreamingError(error="connection broken")

    monkeypatch.setattr(s3.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(client, "get_object", lambda **key: {"Body": Torn()} if len(failures) < 2 else real(**key))
    assert read_bytes("s3://matvlm-test/x") == b"content"
    assert len(failures) == 2
    monkeypatch.setattr(client, "get_object", lambda **key: {"Body": Torn()})
    with pytest.raises(StorageError, match=r"s3://matvlm-test/x: cannot read: .*connection broken"):
        read_bytes("s3://matvlm-test/x")


def test_trouble_with_s3_is_no_bad_sample(tmp_path: Path, client: Any) -> None:
    talk = write_talk(tmp_path / "talk.json", ["a.png"])
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/images: cannot list: .*NoSuchBucket"):
        prepare(Data(source="llava", path=str(talk), image_folder="s3://no-such-bucket/images"), 0, tmp_path / "out")
    with pytest.raises(DataError, match=r"s3://matvlm-test/none\.json: cannot read the conversations .*NoSuchKey"):
        prepare(Data(source="llava", path="s3://matvlm-test/none.json"), 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
