"""Objects in S3 through boto3, which reads the usual ``AWS_*`` variables, ``AWS_ENDPOINT_URL`` included.

An object appears whole. A folder is many objects, so its JSON files (the manifest or config that readers open first)
are sent last and removed first. Local copies are kept under ``$MATVLM_CACHE`` (``~/.cache/matvlm``).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from matvlm.storage.atomic import MissingError, StorageError, atomic_folder, atomic_path, clear_remains, hidden_folder
from matvlm.storage.names import is_below

_DELETE_LIMIT = 1000
"""Keys in one delete request (S3 API)."""

BODY_ATTEMPTS = 3
"""How often a response is asked for whose connection breaks off; boto3 repeats only what fails before that."""

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


def names(uri: str) -> list[str]:
    """The names of the objects directly in the folder or bucket ``uri``.

    Raises:
        StorageError: the bucket cannot be listed.
    """
    bucket, _, key = uri.removeprefix("s3://").strip("/").partition("/")
    prefix = f"{key}/" if key else ""
    with _named_errors(uri, "list"):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]


def read(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """``size`` bytes of the object from ``offset`` on, fewer where it ends; all the rest with None."""
    from botocore.exceptions import BotoCoreError, ClientError

    if size == 0:
        return b""
    bucket, key = _split(uri)
    part = {"Range": f"bytes={offset}-{'' if size is None else offset + size - 1}"} if offset or size else {}
    with _named_errors(uri, "read"):
        for attempt in itertools.count(1):
            try:
                content: bytes = _client().get_object(Bucket=bucket, Key=key, **part)["Body"].read()
                return content
            except ClientError as error:
                if _code(error) == "InvalidRange":  # it ends before
                    return b""
                raise
            except BotoCoreError:
                if attempt == BODY_ATTEMPTS:
                    raise
                time.sleep(attempt)
    raise AssertionError


class ObjectFile(io.RawIOBase):
    """The object at ``uri``, read by ranges."""

    def __init__(self, uri: str):
        self.uri, self.place = uri, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("from the end of an object")
        self.place = offset + (self.place if whence == io.SEEK_CUR else 0)
        return self.place

    def readinto(self, buffer: Any) -> int:
        content = read(self.uri, self.place, len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def write(uri: str, content: bytes) -> None:
    """Make ``content`` the object at ``uri``."""
    bucket, key = _split(uri)
    with _named_errors(uri, "write"):
        _client().put_object(Bucket=bucket, Key=key, Body=content)


def send(file: Path, uri: str) -> None:
    """Make a local file the object at ``uri``; the object that was there stays until all of the file has arrived."""
    bucket, key = _split(uri)
    with _named_errors(uri, "upload"):
        _client().upload_file(str(file), bucket, key)


def receive(uri: str, file: Path) -> None:
    """Write the object at ``uri`` to a new local file."""
    bucket, key = _split(uri)
    with _named_errors(uri, "download"):
        _client().download_file(bucket, key, str(file))


def copy(source: str, uri: str) -> None:
    """Make the content of the object at ``source`` that of the object at ``uri``, without fetching it."""
    (source_bucket, source_key), (bucket, key) = _split(source), _split(uri)
    with _named_errors(uri, f"copy {source} there"):
        _client().copy({"Bucket": source_bucket, "Key": source_key}, bucket, key)


def upload(source: Path, uri: str) -> None:
    """Put a local file or folder at ``uri``, in place of the objects there."""
    remove(uri)
    if source.is_file():
        names = [""]
    else:
        names = [f"/{path.relative_to(source).as_posix()}" for path in source.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):
        send(Path(f"{source}{name}"), uri.rstrip("/") + name)


def download(uri: str) -> Path:
    """A local copy of an object or folder in the cache; fetched once while unchanged.

    Raises:
        MissingError: nothing is at ``uri``.
        StorageError: it cannot be fetched, or the name of an object leads out of the folder.
    """
    found = objects(uri)
    if not found:
        raise MissingError(f"{uri}: no such object or folder")
    for name in found:
        if name and not is_below(name):
            raise StorageError(f"{uri}: the object {name!r} has no place in a local folder; rename or remove it")
    identity = hashlib.sha256(json.dumps([uri, sorted(found.items())]).encode()).hexdigest()
    target = cache() / identity[:32] / Path(uri).name
    if target.exists():
        return target
    with atomic_path(target) as path:
        for name in found:
            file = path / name if name else path
            file.parent.mkdir(parents=True, exist_ok=True)
            receive(f"{uri.rstrip('/')}/{name}", file)
    return target


@contextmanager
def passing_copy(uri: str) -> Iterator[Path]:
    """A local copy of one object while the block lasts; see ``download`` for one that stays."""
    with _scratch(uri) as folder:
        with atomic_path(folder / Path(uri).name) as copy:
            receive(uri, copy)
        yield folder / Path(uri).name


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
    if cache().is_dir():
        clear_remains(cache())
    bucket, key = _split(uri)
    with _named_errors(uri, "list the uploads"):
        for page in _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=f"{key}/"):
            for upload in page.get("Uploads", []):
                _client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def remove(uri: str) -> None:
    """Delete the object or folder at ``uri``; fine if nothing is there."""
    delete(uri, sorted(objects(uri), key=lambda name: (not name.endswith(".json"), name)))


def delete(uri: str, names: list[str]) -> None:
    """Delete the objects ``names`` of the folder ``uri`` in this order, ``""`` for the object ``uri`` itself."""
    bucket, key = _split(uri)
    keys = [{"Key": f"{key}/{name}" if name else key} for name in names]
    for start in range(0, len(keys), _DELETE_LIMIT):
        with _named_errors(uri, "remove"):
            done = _client().delete_objects(Bucket=bucket, Delete={"Objects": keys[start : start + _DELETE_LIMIT]})
        for error in done.get("Errors", []):  # of single keys, in an answer that is a success
            raise StorageError(f"s3://{bucket}/{error['Key']}: cannot remove: {error['Code']}: {error.get('Message')}")


def cache() -> Path:
    """Where local copies are kept; it need not exist."""
    return Path(os.environ.get("MATVLM_CACHE") or Path.home() / ".cache" / "matvlm")


def _scratch(uri: str) -> AbstractContextManager[Path]:
    return hidden_folder(cache() / hashlib.sha256(uri.encode()).hexdigest()[:32])


def _client() -> Any:
    return _client_of(os.getpid())


@lru_cache(maxsize=1)
def _client_of(process: int) -> Any:
    """One client per ``process``: connections that a fork shares mix up their answers."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 8}, max_pool_connections=32))


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
        kind = MissingError if isinstance(error, ClientError) and _code(error) in _NO_OBJECT else StorageError
        raise kind(f"{uri}: cannot {action}: {error}") from error


def _code(error: Any) -> str | None:
    """S3's own name of what went wrong."""
    code: str | None = error.response.get("Error", {}).get("Code")
    return code
