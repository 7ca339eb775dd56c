"""Objects in S3 through boto3, which reads the usual ``AWS_*`` variables, ``AWS_ENDPOINT_URL`` included.

An object appears whole. A folder is many objects, so its JSON files (the manifest or config that readers open first)
are sent last and removed first. Local copies are kept under ``$MATVLM_CACHE`` (``~/.cache/matvlm``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from matvlm.storage.atomic import MissingError, StorageError, atomic_folder, atomic_path, clear_remains, hidden_folder

_DELETE_LIMIT = 1000
"""Keys in one delete request (S3 API)."""

_NO_OBJECT = {"NoSuchKey", "404"}
"""Codes of a request for an object that is not there; the second is that of a request without a body."""


def objects(uri: str) -> dict[str, str]:
    """Key below ``uri`` -> ETag, for every object in the folder ``uri``; one entry ``""`` if ``uri`` is an object.

    Raises:
        StorageError: the bucket cannot be listed.
    """
    bucket, key = _split(uri)
    found: dict[str, str] = {}
    with _named_errors(uri, "list"):
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for item in page.get("Contents", []):
                name = item["Key"].removeprefix(key)
                if not key or not name or name.startswith("/"):
                    found[name.removeprefix("/")] = item["ETag"]
    return found


def read(uri: str) -> bytes:
    """The object's content."""
    bucket, key = _split(uri)
    with _named_errors(uri, "read"):
        content: bytes = _client().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content


def write(uri: str, content: bytes) -> None:
    """Make ``content`` the object at ``uri``."""
    bucket, key = _split(uri)
    with _named_errors(uri, "write"):
        _client().put_object(Bucket=bucket, Key=key, Body=content)


def upload(source: Path, uri: str) -> None:
    """Put a local file or folder at ``uri``, in place of the objects there."""
    remove(uri)
    bucket, key = _split(uri)
    if source.is_file():
        names = [""]
    else:
        names = [f"/{path.relative_to(source).as_posix()}" for path in source.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
        with _named_errors(uri + name, "upload"):
            _client().upload_file(f"{source}{name}", bucket, key + name)


def download(uri: str) -> Path:
    """A local copy of an object or folder in the cache; fetched once while unchanged.

    Raises:
        MissingError: nothing is at ``uri``.
        StorageError: it cannot be fetched.
    """
    found = objects(uri)
    if not found:
        raise MissingError(f"{uri}: no such object or folder")
    bucket, key = _split(uri)
    identity = hashlib.sha256(json.dumps([uri, sorted(found.items())]).encode()).hexdigest()
    target = _cache() / identity[:32] / Path(key).name
    if target.exists():
        return target
    with atomic_path(target) as path:
        for name in found:
            file = path / name if name else path
            file.parent.mkdir(parents=True, exist_ok=True)
            with _named_errors(uri, "download"):
                _client().download_file(bucket, f"{key}/{name}" if name else key, str(file))
    return target


@contextmanager
def passing_copy(uri: str) -> Iterator[Path]:
    """A local copy of one object while the block lasts; see ``download`` for one that stays."""
    bucket, key = _split(uri)
    with _scratch(uri) as folder:
        with atomic_path(folder / Path(key).name) as copy, _named_errors(uri, "download"):
            _client().download_file(bucket, key, str(copy))
        yield folder / Path(key).name


@contextmanager
def new_folder(uri: str) -> Iterator[Path]:
    """An empty local folder that is uploaded to ``uri``, in place of the objects there, when the block succeeds."""
    with _scratch(uri) as scratch:
        local = scratch / Path(uri).name
        with atomic_folder(local) as folder:
            yield folder
        upload(local, uri)


def clear_unfinished(uri: str) -> None:
    """Drop what was sent of objects below ``uri`` that never got whole, which S3 hides and charges for, and scratch."""
    if _cache().is_dir():
        clear_remains(_cache())
    bucket, key = _split(uri)
    with _named_errors(uri, "list the uploads"):
        for page in _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{key}/"):
            for upload in page.get("Uploads", []):
                _client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def remove(uri: str) -> None:
    """Delete the object or folder at ``uri``; fine if nothing is there."""
    bucket, key = _split(uri)
    names = sorted(objects(uri), key=lambda name: (not name.endswith(".json"), name))
    keys = [{"Key": f"{key}/{name}" if name else key} for name in names]
    for start in range(0, len(keys), _DELETE_LIMIT):
        with _named_errors(uri, "remove"):
            _client().delete_objects(Bucket=bucket, Delete={"Objects": keys[start : start + _DELETE_LIMIT]})


def _cache() -> Path:
    return Path(os.environ.get("MATVLM_CACHE") or Path.home() / ".cache" / "matvlm")


def _scratch(uri: str) -> AbstractContextManager[Path]:
    return hidden_folder(_cache() / hashlib.sha256(uri.encode()).hexdigest()[:32])


@lru_cache(maxsize=1)
def _client() -> Any:
    import boto3

    return boto3.client("s3")


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").strip("/").partition("/")
    if not uri.startswith("s3://") or not bucket or not key:
        raise StorageError(f"{uri}: expected s3://bucket/key")
    return bucket, key


@contextmanager
def _named_errors(uri: str, action: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else None
        kind = MissingError if code in _NO_OBJECT else StorageError
        raise kind(f"{uri}: cannot {action}: {error}") from error
