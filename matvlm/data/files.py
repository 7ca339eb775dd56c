"""Files of a data source, whole or in part, local or in S3; for many threads and many processes at once."""

from __future__ import annotations

import fnmatch
import io
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from matvlm.storage import StorageError

BLOCK = 1 << 22
"""Bytes that ``open_file`` fetches at once from S3."""
BODY_ATTEMPTS = 3
"""How often a response is asked for whose connection breaks off; boto3 repeats only what fails before that."""


def is_remote(uri: str) -> bool:
    return uri.startswith("s3://")


def read(uri: str, offset: int = 0, size: int | None = None) -> bytes:
    """``size`` bytes from ``offset`` on, fewer where the file ends; all the rest with None.

    Raises:
        StorageError: S3 cannot be reached or does not allow it.
        OSError: there is no such file (``FileNotFoundError``), or a local one cannot be read.
    """
    if is_remote(uri):
        return _read_object(uri, offset, size)
    with open(uri, "rb") as file:
        file.seek(offset)
        return file.read(-1 if size is None else size)


def open_file(uri: str) -> io.BufferedReader:
    """The file for reading and seeking. Raises as ``read`` does."""
    if is_remote(uri):
        return io.BufferedReader(_RemoteFile(uri), BLOCK)
    return open(uri, "rb")


def names(folder: str, pattern: str = "*") -> list[str]:
    """The names, sorted, of the files directly in ``folder`` that ``pattern`` (``*``, ``?``, ``[ab]``) fits.

    Raises:
        StorageError: the bucket cannot be listed.
        OSError: there is no such local folder, or it cannot be read.
    """
    found = _objects(folder) if is_remote(folder) else [entry.name for entry in os.scandir(folder) if entry.is_file()]
    return sorted(name for name in found if fnmatch.fnmatchcase(name, pattern))


def join(folder: str, name: str) -> str:
    """The file ``name`` of ``folder``; a local one as an absolute path."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str((Path(folder) / name).absolute())


class _RemoteFile(io.RawIOBase):
    """An object in S3, read by ranges."""

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
        content = _read_object(self.uri, self.place, len(buffer))
        buffer[: len(content)] = content
        self.place += len(content)
        return len(content)


def _read_object(uri: str, offset: int, size: int | None) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    if size == 0:
        return b""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    wanted = {"Range": f"bytes={offset}-{'' if size is None else offset + size - 1}"} if offset or size else {}
    for attempt in range(1, BODY_ATTEMPTS + 1):
        try:
            content: bytes = _client(os.getpid()).get_object(Bucket=bucket, Key=key, **wanted)["Body"].read()
            return content
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "InvalidRange":  # it ends before
                return b""
            if code in ("NoSuchKey", "404"):
                raise FileNotFoundError(f"no such object as {uri}") from None
            raise StorageError(f"{uri}: cannot read: {error}") from error
        except BotoCoreError as error:
            if attempt == BODY_ATTEMPTS:
                raise StorageError(f"{uri}: cannot read: {error}") from error
            time.sleep(attempt)
    raise AssertionError


def _objects(folder: str) -> list[str]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = folder.rstrip("/").removeprefix("s3://").partition("/")
    prefix = f"{key}/" if key else ""
    try:
        pages = (
            _client(os.getpid()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, Delimiter="/")
        )
        return [item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])]
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{folder}: cannot list: {error}") from error


@lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """One client per ``process``: connections that a fork shares mix up their answers."""
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(retries={"mode": "standard", "max_attempts": 8}, max_pool_connections=32))
