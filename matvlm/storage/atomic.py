"""Local files and folders that appear under their name only when they are complete and on the disk.

Until then they grow in a hidden folder beside it that the writer holds a lock on. Readers never look there; when a
writer was killed its lock is gone, and the next writer of the same name clears the remains away, or ``clear_remains``
those of every name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

UNFINISHED = ".unfinished-"
"""Part of the name of every hidden folder."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NEARLY_FULL = 1 << 20
"""Bytes. A library that hides the errno (``torch.save`` does) is taken to have met a full disk below this."""


class StorageError(OSError):
    """A file or folder cannot be read or written; the message names it and the reason."""


class MissingError(StorageError):
    """Nothing is there, as opposed to something that cannot be read now."""


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path at which to create a file or a folder; it becomes ``target`` when the block succeeds.

    The yielded path does not exist yet, is on the target's disk and has the target's name, for writers that look at the
    suffix. An existing target is replaced; a crash between the two renames that replace a folder
    leaves none there, never a mixture.

    Raises:
        StorageError: the disk is full or not writable. After that, or any other error, the target is as it was.
    """
    path = Path(target)
    with hidden_folder(path) as folder:
        written = folder / path.name
        try:
            yield written
            _sync_tree(written)
        except Exception as error:
            if _is_disk_full(error, folder):
                raise cannot_write(path, error) from error
            raise
        if path.is_dir() or (path.exists() and written.is_dir()):
            os.replace(path, folder / f"{path.name}.old")
        os.replace(written, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """``atomic_path`` for a folder: the yielded path is an empty folder already."""
    with atomic_path(target) as path:
        path.mkdir()
        yield path


@contextmanager
def hidden_folder(path: Path) -> Iterator[Path]:
    """A locked hidden folder beside ``path``, removed with what is left in it at the end.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_remains(path.parent, _prefix(path))
        folder, lock = _claim(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def clear_remains(folder: Path, prefix: str = ".") -> None:
    """Remove the hidden folders in ``folder`` that start with ``prefix`` and that no living writer holds a lock on.

    Raises:
        OSError: ``folder`` cannot be listed.
    """
    for name in os.listdir(folder):
        if not (name.startswith(prefix) and UNFINISHED in name):
            continue
        with suppress(OSError):  # still being written, or cleared by another writer just now
            lock = os.open(folder / name, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder / name, ignore_errors=True)
            finally:
                os.close(lock)


def finished_files(folder: Path) -> list[str]:
    """Every file below ``folder`` that no writer is still at, as sorted names relative to it; none if it is no folder.

    Raises:
        StorageError: it cannot be listed.
    """
    found = []
    for place, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if UNFINISHED not in name]
        found += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def _cannot_list(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # it went away meanwhile, or never was
        raise StorageError(f"{error.filename}: cannot list: {error.strerror}") from error


def _claim(path: Path) -> tuple[Path, int]:
    while True:
        folder = path.parent / f"{_prefix(path)}{token_hex(4)}"
        folder.mkdir()
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a disk without locks, where remains are never cleared
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # else another writer took it for remains before it was locked
                return folder, lock
            os.close(lock)


def _prefix(path: Path) -> str:
    return f".{path.name}{UNFINISHED}"


def _sync_tree(path: Path) -> None:
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: Exception, folder: Path) -> bool:
    if isinstance(error, StorageError):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_FULL
    return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < _NEARLY_FULL


def cannot_write(path: Path, error: Exception) -> StorageError:
    """What to raise when writing ``path`` met ``error``: that itself, if it says so already."""
    if isinstance(error, StorageError):
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    disk = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(disk).free / (1 << 20)
    return StorageError(f"{path}: cannot write: {reason} ({free:.1f} MiB free there); make room or use another folder")
