"""Files and folders by URI, a local path or ``s3://bucket/key``: whole, or not there at all.

How that is kept locally is in ``atomic``, how on S3 in ``s3``. ``atomic_path`` and ``atomic_folder`` are for stages
that write files with a library of their own, the first locally only; ``Mirror`` is for whole steps that do.
"""

from __future__ import annotations

import fnmatch
import io
import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from matvlm.storage import atomic, s3
from matvlm.storage.atomic import MissingError, StorageError, atomic_path, hidden_folder
from matvlm.storage.mirror import Mirror
from matvlm.storage.names import Uri, folder_name, join, local_path, s3_uri, sha256_file

__all__ = [
    "Mirror",
    "MissingError",
    "StorageError",
    "atomic_folder",
    "atomic_path",
    "clear_unfinished",
    "exists",
    "folder_name",
    "join",
    "list_files",
    "list_names",
    "local_copy",
    "open_file",
    "passing_copy",
    "put",
    "read_bytes",
    "read_json",
    "remove",
    "sha256_file",
    "write_bytes",
    "write_json",
]

BLOCK = 1 << 22
"""Bytes that ``open_file`` fetches at once from S3."""


def exists(uri: Uri) -> bool:
    """Whether a file or folder is at ``uri``; on S3 a folder is there as soon as one object is in it."""
    remote = s3_uri(uri)
    return bool(s3.objects(remote)) if remote else local_path(uri).exists()


def list_files(uri: Uri) -> list[str]:
    """Every finished file below the folder ``uri``, as sorted names relative to it; none if there is no folder.

    Raises:
        StorageError: a folder is there and cannot be listed.
    """
    if remote := s3_uri(uri):
        return sorted(name for name in s3.objects(remote) if name)
    return atomic.finished_files(local_path(uri))


def list_names(uri: Uri, pattern: str = "*") -> list[str]:
    """The names, sorted, of the files directly in the folder ``uri`` that ``pattern`` (``*``, ``?``, ``[ab]``) fits.

    Raises:
        StorageError: it cannot be listed; locally also where there is no folder.
    """
    if remote := s3_uri(uri):
        found = s3.names(remote)
    else:
        try:
            found = [entry.name for entry in os.scandir(local_path(uri)) if entry.is_file()]
        except OSError as error:
            raise StorageError(f"{uri}: cannot list: {error.strerror or error}") from error
    return sorted(name for name in found if fnmatch.fnmatchcase(name, pattern))


def open_file(uri: Uri) -> io.BufferedReader:
    """The file for reading and seeking, but not from its end; on S3 only what is read is fetched.

    Raises:
        StorageError: it is local and cannot be opened. What is wrong on S3 comes up when it is read.
    """
    if remote := s3_uri(uri):
        return io.BufferedReader(s3.ObjectFile(remote), BLOCK)
    try:
        return open(local_path(uri), "rb")
    except OSError as error:
        raise _cannot_read(uri, error) from error


def read_bytes(uri: Uri, offset: int = 0, size: int | None = None) -> bytes:
    """The content of a file: ``size`` bytes from ``offset`` on, fewer where it ends; all the rest with None.

    Raises:
        MissingError: there is none.
        StorageError: it cannot be read.
    """
    if remote := s3_uri(uri):
        return s3.read(remote, offset, size)
    try:
        with open(local_path(uri), "rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)
    except OSError as error:
        raise _cannot_read(uri, error) from error


def read_json(uri: Uri) -> Any:
    """The value in a JSON file.

    Raises:
        StorageError: it is missing, cannot be read or is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not valid JSON: {error}") from error


def write_bytes(uri: Uri, content: bytes) -> None:
    """Make ``content`` the file at ``uri``, in place of what is there.

    Raises:
        StorageError: it cannot be written; what was there before is still there.
    """
    if remote := s3_uri(uri):
        s3.write(remote, content)
        return
    with atomic_path(local_path(uri)) as path:
        path.write_bytes(content)


def write_json(uri: Uri, value: Any) -> None:
    """Write ``value`` as indented JSON; see ``write_bytes``."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def atomic_folder(uri: Uri) -> AbstractContextManager[Path]:
    """Give an empty local folder to the block; what is in it becomes ``uri`` when the block succeeds.

    Raises:
        StorageError: it cannot be written. After that, or any other error, nothing unfinished is read as ``uri``.
    """
    remote = s3_uri(uri)
    return s3.new_folder(remote) if remote else atomic.atomic_folder(local_path(uri))


def clear_unfinished(uri: Uri) -> None:
    """Remove what killed writers left unfinished in the folder ``uri``.

    Locally a writer that still lives is left alone. S3 cannot tell: nobody else may be writing there.

    Raises:
        StorageError: the folder cannot be looked at.
    """
    if remote := s3_uri(uri):
        s3.clear_unfinished(remote)
    elif (folder := local_path(uri)).is_dir():
        try:
            atomic.clear_remains(folder)
        except OSError as error:
            raise StorageError(f"{uri}: cannot read: {error.strerror or error}") from error


def put(source: Path, uri: Uri) -> None:
    """Copy a local file or folder to ``uri``, in place of what is there.

    Raises:
        StorageError: it cannot be written.
    """
    if remote := s3_uri(uri):
        s3.upload(source, remote)
        return
    with atomic_path(local_path(uri)) as path:
        if source.is_dir():
            shutil.copytree(source, path)
        else:
            shutil.copyfile(source, path)


def local_copy(uri: Uri) -> Path:
    """A local path to read the file or folder ``uri`` from: itself, or for S3 a cached download (see ``s3.download``).

    Raises:
        MissingError: nothing is at ``uri``.
        StorageError: it cannot be fetched.
    """
    if remote := s3_uri(uri):
        return s3.download(remote)
    path = local_path(uri)
    if not path.exists():
        raise MissingError(f"{uri}: no such file or folder")
    return path


def passing_copy(uri: Uri) -> AbstractContextManager[Path]:
    """A local path to read the file ``uri`` from while the block lasts: ``local_copy`` without a place in the cache.

    Raises:
        MissingError: nothing is at ``uri``.
        StorageError: it cannot be fetched.
    """
    remote = s3_uri(uri)
    return s3.passing_copy(remote) if remote else nullcontext(local_copy(uri))


def remove(uri: Uri) -> None:
    """Remove a file or folder; locally its readers see all of it or nothing. Fine if nothing is there."""
    if remote := s3_uri(uri):
        s3.remove(remote)
        return
    path = local_path(uri)
    if path.exists():
        with hidden_folder(path) as folder:
            os.replace(path, folder / path.name)


def _cannot_read(uri: Uri, error: OSError) -> StorageError:
    kind = MissingError if isinstance(error, FileNotFoundError) else StorageError
    return kind(f"{uri}: cannot read: {error.strerror or error}")
