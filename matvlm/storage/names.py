"""URIs of files and folders, and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from matvlm.storage.atomic import StorageError

Uri = str | os.PathLike[str]


def join(uri: Uri, *parts: str) -> str:
    """``uri`` with ``parts`` appended, each after one ``/``."""
    return "/".join([os.fspath(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def folder_name(uri: Uri) -> str:
    """A name for a folder about ``uri``: readable, of at most 69 characters, and another one for any other URI."""
    text = os.fspath(uri)
    words = "-".join(re.findall(r"\w+", text))[-60:]
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_below(name: str) -> bool:
    """Whether ``name``, given relative to a folder, is plainly that of something in it: ``a/b``, and not ``a/../b``."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or path.as_posix() != name or not path.name or "\0" in name)


def s3_uri(uri: Uri) -> str | None:
    """``uri`` where it is on S3, else None.

    Raises:
        StorageError: it is a Path of what was a URI on S3.
    """
    text = os.fspath(uri)
    if isinstance(uri, os.PathLike) and text.startswith("s3:/"):
        raise StorageError(f"{text}: a Path drops a slash of s3://; pass the URI as text")
    return text if text.startswith("s3://") else None


def local_path(uri: Uri) -> Path:
    """``uri`` as a local path.

    Raises:
        StorageError: it is the URI of something else.
    """
    text = os.fspath(uri)
    if "://" in text:
        raise StorageError(f"{text}: neither a local path nor s3://bucket/key")
    return Path(text)


def sha256_file(path: Uri) -> str:
    """Hexadecimal sha256 of a local file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
