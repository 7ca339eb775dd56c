"""What every benchmark has in common: finding its data, turning rows into documents, and its images, decoded late.

lm-eval loads this file by its path, so it imports nothing of its neighbours; a benchmark's YAML hands its own functions
to ``load`` through ``dataset_kwargs``. A row is a dictionary with the columns of the benchmark's data set on the hub
and its number, ``row``; a document is what ``document(row)`` makes of it, with ``images``, a list of stored images:
encoded bytes, the path of a file, or a dictionary of either as the ``datasets`` library has it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import EpsImagePlugin, Image

EpsImagePlugin.gs_binary = False  # an EPS file is a program, which Pillow would have Ghostscript run

IMAGE_MARK = "<image>"
IMAGES_KEPT = 64
"""Decoded images kept, since questions about one image often follow each other."""

_SAVED = ("dataset_dict.json", "dataset_info.json")

log = logging.getLogger("matvlm.tasks")

_stored: dict[str, Callable[[], Any]] = {}
"""Where an image is, as documents name it -> how to get at it, for images that are no files of their own."""


class BenchmarkError(ValueError):
    """A benchmark's data cannot be used; the message names the file and the field, and says what to do."""


class Files:
    """A benchmark's own files in ``folder``. A method gets the names that one file goes by and uses what is there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, *names: str) -> Path:
        """The first file or folder there is; names may be patterns."""
        found = [path for name in names for path in sorted(self.folder.glob(name))]
        if not found:
            raise FileNotFoundError(f"there is no {' or '.join(names)}")
        return found[0]

    def json(self, *names: str) -> Any:
        """The value in a JSON file."""
        path = self.path(*names)
        return _parse(path.read_text(encoding="utf-8"), str(path))

    def lines(self, *names: str) -> list[Any]:
        """The values in a file with a JSON value on each line."""
        path = self.path(*names)
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BenchmarkError(f"{where}: malformed JSON: {error}") from None


def load(
    *,
    name: str,
    hub: str,
    split: str,
    columns: Sequence[str],
    document: Callable[[dict[str, Any]], dict[str, Any]],
    original: Callable[[Files], Sequence[dict[str, Any]]] | None = None,
    config: str | None = None,
    joined: Mapping[str, str] | None = None,
    data_root: str | Mapping[str, str] | None = None,
    hub_org: str = "lmms-lab",
    max_bad_share: float = 0.01,
    **_: Any,
) -> dict[str, Any]:
    """The documents of a benchmark as lm-eval's ``custom_dataset`` wants them.

    Args:
        name: the task, which ids start with.
        hub, config, split: the data set ``hub_org/hub`` on the Hugging Face hub.
        columns: those that ``document`` cannot do without.
        original: reads the benchmark's own files, where it has such, as rows.
        joined: ``config`` with the images, and the column ``key`` whose value is the ``id`` of a row's image there.
        data_root: a folder with the data, local or ``s3://``, or one for each task; without it the hub is asked.
        max_bad_share: more unusable rows than this share of all are refused; up to it they are named and left out.

    Raises:
        BenchmarkError: there are no such data, a column is missing, or too many rows are unusable.
    """
    root = data_root.get(name) if isinstance(data_root, Mapping) else data_root
    source = str(root or f"{hub_org}/{hub}")
    folder = _local(str(root)) if root else None
    open_rows = partial(_hub_rows, f"{hub_org}/{hub}", split) if folder is None else partial(_rows, folder, split)
    if folder is None or _is_dataset(folder, split):
        rows: Any = open_rows(config)
        if joined:
            rows = _Joined(rows, open_rows(joined["config"]), joined["key"])
        _check_columns(rows, columns, source)
    else:
        rows = _original(original, Files(folder), f"split {split!r} of the data set {hub}")
    documents, bad = _documents(rows, columns, document, name, source, str(folder or source))
    _check_share(bad, len(rows), max_bad_share, source)
    return {"test": _dataset(documents, {"source": source, "questions": len(documents), "left_out": bad})}


def images(doc: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a document, for lm-eval's ``doc_to_image``."""
    return [LateImage(where) for where in doc["images"]]


class LateImage(Image.Image):
    """An image in RGB that is read and decoded when it is looked at, not before, and not kept after that.

    lm-eval makes all requests, with their images, before the first of them is answered. ``where`` is equal for the same
    image.
    """

    def __init__(self, where: str):
        super().__init__()
        self.where = where

    @property  # type: ignore[misc]  # nobody is to set it
    def im(self) -> Any:
        return _decoded(self.where).im

    @property
    def size(self) -> tuple[int, int]:
        return _decoded(self.where).size

    @property
    def mode(self) -> str:
        return "RGB"

    def load(self) -> Any:
        return _decoded(self.where).load()

    def encoded(self) -> bytes:
        """The content of the image file."""
        return _read(self.where)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.copy(),)


def _same(image: Image.Image) -> Image.Image:
    return image


@lru_cache(maxsize=IMAGES_KEPT)
def _decoded(where: str) -> Image.Image:
    try:
        with Image.open(BytesIO(_read(where))) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow has no common error: OSError, SyntaxError, struct.error, ...
        raise BenchmarkError(f"{where}: the image cannot be read: {error}") from error


def _read(where: str) -> bytes:
    content = _content(_stored[where]() if where in _stored else where)
    return content if isinstance(content, bytes) else Path(content).read_bytes()


def _documents(
    rows: Sequence[Any],
    columns: Sequence[str],
    document: Callable[..., dict[str, Any]],
    name: str,
    source: str,
    place: str,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The usable documents, and for every other row what is wrong with it."""
    documents: list[dict[str, Any]] = []
    bad: list[str] = []
    seen: set[str] = set()
    for number in range(len(rows)):
        row = {"row": number, **rows[number]}
        try:
            doc = document(row)
            doc["id"] = f"{name}-{doc['id']}"
            late = partial(_image_of, rows, document, number)
            where = f"{source}, {name}, row {number}"
            doc["images"] = [_place(image, where, n, late, place) for n, image in enumerate(doc["images"])]
            _check(doc, seen)
        except (KeyError, ValueError, TypeError, AttributeError, OSError) as error:
            bad.append(f"row {number}: {_reason(error, row, columns)}")
        else:
            seen.add(doc["id"])
            documents.append(doc)
    return documents, bad


def _reason(error: Exception, row: Mapping[str, Any], columns: Sequence[str]) -> str:
    empty = [column for column in columns if row.get(column) is None]
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return f"is empty: {', '.join(empty)}" if empty and isinstance(error, TypeError | AttributeError) else str(error)


def _image_of(rows: Sequence[Any], document: Callable[..., Any], number: int, image: int) -> Any:
    return document({"row": number, **rows[number]})["images"][image]


def _place(stored: Any, where: str, number: int, late: Callable[[int], Any], place: str) -> str:
    """Where a stored image is, after a look at it: a path, or a name under which ``_read`` gets it from its row.

    ``place`` is the folder of the data or their hub id, which a path may not lead out of.
    """
    content = _content(stored)
    if not content:
        raise ValueError(f"image {number} is empty")
    if not isinstance(content, bytes):
        if not _is_own_file(str(content), place):
            raise ValueError(f"image file {content} is not in the folder of these data")
        _check_file(str(content))
        return str(content)
    _check_image(BytesIO(content), f"image {number}")
    where = f"{where}, image {number}"
    _stored[where] = partial(late, number)
    return where


def _is_own_file(path: str, place: str) -> bool:
    """``matvlm.data.images.is_own_file``, again because lm-eval runs the tasks where that may not be installed."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [place] if Path(place).is_dir() else [str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE]
    parents = [parent for folder in folders for parent in (os.path.abspath(folder), os.path.realpath(folder))]
    return any(Path(os.path.abspath(path)).is_relative_to(parent) for parent in parents)


def _content(stored: Any) -> Any:
    """The bytes or the path of a stored image."""
    if isinstance(stored, Mapping):
        return stored["bytes"] if stored.get("bytes") is not None else stored["path"]
    return stored


@cache
def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise ValueError(f"image file {path} is missing")
    with open(path, "rb") as file:
        _check_image(file, path)


def _check_image(file: BinaryIO, name: str) -> None:
    """Refuse what is no image. Only one that does not end as its format does, as if cut off, is decoded for that."""
    ends = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
    try:
        with Image.open(file) as image:
            file.seek(-min(64, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if ends.get(image.format or "", b"no such end") not in file.read():
                image.load()
    except Exception as error:  # Pillow has no common error: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{name}: is no image, or a damaged one: {error}") from None


def _check(doc: Mapping[str, Any], seen: set[str]) -> None:
    if doc["id"] in seen:
        raise ValueError(f"id {doc['id']!r} is there twice")
    if not isinstance(doc["question"], str) or not doc["question"].strip():
        raise ValueError("question is empty")
    texts = [each for value in doc.values() for each in (value if isinstance(value, list) else [value])]
    if any(isinstance(text, str) and IMAGE_MARK in text for text in texts):
        raise ValueError(f"holds the mark {IMAGE_MARK}, which stands for an image")


def _check_columns(rows: Any, columns: Iterable[str], source: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise BenchmarkError(
            f"{source}: has no column {', '.join(map(repr, missing))}, only {', '.join(rows.column_names)}; "
            "is it the data set of this benchmark?"
        )


def _check_share(bad: list[str], total: int, share: float, source: str) -> None:
    for reason in bad[:5]:
        log.warning("%s: left out: %s", source, reason)
    if total == 0:
        raise BenchmarkError(f"{source}: holds no questions")
    if len(bad) > share * total:
        raise BenchmarkError(
            f"{source}: {len(bad)} of {total} questions cannot be used, more than max_bad_share={share}; the first: "
            f"{bad[0]}; mend the data, or raise max_bad_share in the task's metadata"
        )
    if bad:
        log.warning("%s: %d of %d questions cannot be used and are left out", source, len(bad), total)


def _dataset(documents: list[dict[str, Any]], origin: dict[str, Any]) -> Any:
    """The documents, with where they are from in the description: also a hash of all that they say, without pixels."""
    import datasets

    said = [{key: value for key, value in doc.items() if key != "images"} for doc in documents]
    origin["sha256"] = sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    dataset = datasets.Dataset.from_list(documents)
    dataset.info.description = json.dumps(origin)
    return dataset


class _Joined:
    """Rows with the column ``image`` of another data set, looked up by the value of a column."""

    def __init__(self, rows: Any, images: Any, key: str):
        _check_columns(images, ["id", "image"], "its images")
        self.rows, self.images, self.key = rows, images, key
        self.numbers = {id: number for number, id in enumerate(images["id"])}
        self.column_names = [*rows.column_names, "image"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        image = self.numbers.get(row[self.key])
        return {**row, "image": None if image is None else self.images[image]["image"]}


def _local(root: str) -> Path:
    if root.startswith("s3://"):
        try:
            from matvlm.storage import local_copy
        except ImportError:
            raise BenchmarkError(f"{root}: reading from S3 needs the matvlm package (data_root)") from None
        return local_copy(root)
    if not Path(root).is_dir():
        raise BenchmarkError(f"{root}: no such folder (data_root)")
    return Path(root).absolute()


def _is_dataset(folder: Path, split: str) -> bool:
    written = any(path for name in _SAVED for path in folder.rglob(name))
    return written or bool(_parquet(folder, split))


def _parquet(folder: Path, split: str) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.parquet") if path.name.startswith((f"{split}-", f"{split}.")))


def _original(original: Callable[[Files], Any] | None, files: Files, wanted: str) -> Any:
    try:
        if original is None:
            raise FileNotFoundError("it has none but those of the data set")
        return original(files)
    except OSError as error:
        raise BenchmarkError(
            f"{files.folder}: holds neither {wanted} (parquet, or as save_to_disk writes it) nor the benchmark's own "
            f"files: {error} (data_root)"
        ) from None
    except BenchmarkError:
        raise
    except Exception as error:  # whatever a file raises that is not as its format wants it
        raise BenchmarkError(f"{files.folder}: a file of this benchmark is not as expected: {error!r}") from None


def _rows(folder: Path, split: str, config: str | None) -> Any:
    import datasets

    place = folder / config if config and (folder / config).is_dir() else folder
    try:
        if any((place / name).is_file() for name in _SAVED):
            opened = datasets.load_from_disk(str(place))
            return _undecoded(opened[split] if isinstance(opened, datasets.DatasetDict) else opened)
        return _undecoded(datasets.load_dataset("parquet", data_files=_parquet(place, split), split="train"))
    except Exception as error:  # whatever the readers of the formats raise
        raise BenchmarkError(f"{place}: cannot open split {split!r} of this data set: {error}") from None


def _hub_rows(path: str, split: str, config: str | None) -> Any:
    import datasets

    try:
        return _undecoded(datasets.load_dataset(path, config, split=split))
    except Exception as error:  # whatever the hub's client raises
        raise BenchmarkError(
            f"{path}: cannot open split {split!r} of this data set on the hub: {error}; give a folder with "
            "data_root, or the hub's organisation with hub_org, in the task's metadata"
        ) from None


def _undecoded(dataset: Any) -> Any:
    import datasets

    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset
