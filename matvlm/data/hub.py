"""Training data by the ``datasets`` library: an id on the Hugging Face hub, or a folder of parquet, JSON or images.

A row has an ``image`` and either LLaVA-format ``conversations`` or a ``question`` and an ``answer``; ``data.columns``
says what they are called there. No code that comes with a data set is ever run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from matvlm.config import Data
from matvlm.data.images import ImageFolder, is_own_file
from matvlm.data.rows import BadSample, DataError, Entry, Row, StoredImage, is_unicode, turns_in, without_image


def hub_entries(data: Data) -> list[Entry]:
    """Every row of ``data.split``.

    Raises:
        DataError: there is no such data set, it cannot be read, or it lacks a column that is needed.
        StorageError: S3 cannot be reached.
    """
    dataset = _open(data)
    columns = _columns(dataset, data)
    dataset, images = _undecoded(dataset, columns["image"], data)
    return [partial(_row, number, dataset, columns, images, data) for number in range(len(dataset))]


def _open(data: Data) -> Any:
    import datasets

    path = Path(data.path or "")
    if path.is_file():
        raise DataError(f"{path}: is a file; data.path is a hub id or the folder of a data set, or use source 'llava'")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or str(data.path).startswith(".")):
        raise DataError(f"{path}: no such folder (data.path)")
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            opened = datasets.load_from_disk(str(path))
            return opened[data.split] if isinstance(opened, datasets.DatasetDict) else opened
        return datasets.load_dataset(str(data.path), data.name, split=data.split)
    except Exception as error:  # whatever the readers of a dozen formats and the hub's client raise
        reason = f"no such split or field: {error}" if isinstance(error, KeyError) else error
        settings = f"data.path; data.split is {data.split!r}, data.name {data.name!r}"
        raise DataError(f"{data.path}: cannot open this data set ({settings}): {reason}") from None


def _columns(dataset: Any, data: Data) -> dict[str, str]:
    """What we call it -> what the data set calls it, for the columns that are there."""
    named = {ours: data.columns.get(ours, ours) for ours in ("id", "image", "conversations", "question", "answer")}
    found = {ours: theirs for ours, theirs in named.items() if theirs in dataset.column_names}
    talk = ["conversations"] if "conversations" in found else ["question", "answer"]
    missing = [named[ours] for ours in ["image", *talk] if ours not in found]
    missing += [theirs for ours, theirs in data.columns.items() if ours not in found and theirs not in missing]
    if missing:
        lacking, there = ", ".join(map(repr, missing)), ", ".join(dataset.column_names)
        raise DataError(
            f"{data.path}: has no column {lacking}, only {there}; image "
            "and conversations are needed, or image, question and answer: name them with data.columns"
        )
    return found


def _undecoded(dataset: Any, column: str, data: Data) -> tuple[Any, ImageFolder | None]:
    """``dataset`` with image files as they are stored, and where file names are looked up if it holds such."""
    import datasets

    feature = dataset.features[column]
    if isinstance(feature, datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False)), None
    if not isinstance(feature, datasets.Value) or feature.dtype not in (
        "string",
        "large_string",
        "binary",
        "large_binary",
    ):
        raise DataError(
            f"{data.path}: column {column!r} must be one image, its bytes or its file name, and is {feature}"
        )
    if "string" not in feature.dtype:
        return dataset, None
    place = data.image_folder or (data.path if Path(data.path or "").is_dir() else None)
    if not place:
        raise DataError(f"{data.path}: column {column!r} holds file names: set data.image_folder")
    return dataset, ImageFolder(place)


def _row(number: int, dataset: Any, columns: dict[str, str], images: ImageFolder | None, data: Data) -> Row:
    where = f"{data.path}, split {data.split}, row {number}"
    row = dataset[number]
    raw = {ours: row[theirs] for ours, theirs in columns.items()}
    messages = raw["conversations"] if "conversations" in raw else _messages(raw["question"], raw["answer"])
    turns = turns_in(messages, where)
    id = f"{raw.get('id', 'sample')}-{number}"
    image = raw["image"]
    if not image:
        raise without_image(messages, where)
    if not is_unicode(id):
        raise BadSample("malformed entry", f"{where}: holds half a surrogate pair, which is no text")
    return {"id": id, "image": _stored(image, images, data.path or "", where), "turns": turns}


def _messages(question: Any, answer: Any) -> list[dict[str, Any]]:
    """One question and its answer, the first where several are given, in LLaVA's form."""
    first = answer[0] if isinstance(answer, list) and answer else answer
    return [{"from": "human", "value": question}, {"from": "gpt", "value": first}]


def _stored(image: Any, images: ImageFolder | None, path: str, where: str) -> StoredImage:
    if isinstance(image, str):
        assert images is not None
        return images.find(image, where)
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    if image["bytes"] is not None:
        return {"bytes": image["bytes"], "path": None}
    if not is_own_file(image["path"], path):
        raise BadSample("image outside its folder", f"{where}: {image['path']!r} is no file of this data set")
    return {"bytes": None, "path": image["path"]}
