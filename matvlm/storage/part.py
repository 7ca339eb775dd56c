"""One part of a mirrored folder: local files, the same on S3, and the list there that says which they are.

On S3 a file has its own name below ``<folder>/<part>``, and the list is ``<folder>/.mirror/<part>/files.json``. It is
written after the files it lists and true at every moment: a new version of a listed file waits under another name
beside the list until the list leads there, and only then takes the place of the old version.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from matvlm.storage import s3
from matvlm.storage.atomic import MissingError, StorageError, cannot_write, finished_files, hidden_folder
from matvlm.storage.names import is_below, join, sha256_file

LISTS = ".mirror"
LIST = "files.json"
WORKERS = 8
"""Files that are sent or fetched at the same time, each in parts of its own if it is large."""
FETCH_ATTEMPTS = 3
"""How often a part is read anew whose writer changed it meanwhile."""
SETTLED_SECONDS = 2.0
"""A file that changed later than this before it was read may change again without a later time of change."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class Content(NamedTuple):
    size: int
    sha256: str


class ListedFile(BaseModel):
    """What the list says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    """Bytes."""
    sha256: str
    waiting: str | None = None
    """Its name beside the list, while an older version may still have its own name."""

    @property
    def content(self) -> Content:
        return Content(self.size, self.sha256)


class FileList(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, ListedFile]


Files = dict[str, ListedFile]


class Part:
    """The part ``name``, a folder below ``uri`` on S3 and below ``folder`` here.

    It has one writer at a time.
    """

    def __init__(self, uri: str, folder: Path, name: str):
        self.uri, self.folder = join(uri, name), folder / name
        self.lists = join(uri, LISTS, name)
        self.list_uri = join(self.lists, LIST)
        self._known: dict[str, tuple[tuple[int, ...], Content]] = {}

    def fetch(self) -> None:
        """Make the local folder what the list says; leave it as it is where there is no list.

        Raises:
            StorageError: a listed file is missing, is another one or leads out of the part; nothing local has changed.
        """
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            listed = self._listed()
            try:
                if listed is not None:
                    self._bring(listed)
                return
            except StorageError:
                if attempt == FETCH_ATTEMPTS or self._listed() == listed:
                    raise

    def clear_remains(self) -> None:
        """Remove from S3 what killed writers of the part left unfinished."""
        for folder in (self.uri, self.lists):
            s3.clear_unfinished(folder)
        listed = self._listed() or {}
        needed = {LIST, *(file.waiting for file in listed.values())}
        s3.delete(self.lists, [name for name in s3.names(self.lists) if name not in needed])

    def push(self) -> None:
        """Send what is new or changed here, then the list.

        A file that changes or goes away meanwhile is left to the next push.

        Raises:
            StorageError: a file cannot be read or sent; the list is still a true one.
        """
        before = self._listed() or {}
        found = self._contents()
        sent = _in_parallel(lambda name: self._send(name, found[name], before.get(name)), found)
        after = {name: file for name, file in zip(found, sent, strict=True) if file}
        if after != before:
            self._write(after)
        self._settle(after)
        s3.delete(self.lists, [file.waiting for file in before.values() if file.waiting])
        s3.delete(self.uri, sorted(before.keys() - after.keys()))

    def _listed(self) -> Files | None:
        try:
            files = FileList.model_validate_json(s3.read(self.list_uri)).files
        except MissingError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "all of it"
            raise StorageError(
                f"{self.list_uri}: not a list of files: {field}: {first['msg']}; remove the list to start over"
            ) from error
        for name in files:
            if not self._is_inside(name):
                raise StorageError(
                    f"{self.list_uri}: lists {name!r}, which is no file of the folder; remove the list to start over"
                )
        return files

    def _is_inside(self, name: str) -> bool:
        return is_below(name) and (self.folder / name).parent.resolve().is_relative_to(self.folder.resolve())

    def _bring(self, listed: Files) -> None:
        try:
            with hidden_folder(self.folder) as scratch:
                copies = {name: scratch / str(number) for number, name in enumerate(listed)}
                _in_parallel(lambda name: self._receive(name, listed[name], copies[name]), listed)
                for name in finished_files(self.folder):
                    if name not in listed:
                        self._remove(name)
                for name, copy in copies.items():
                    if copy.exists():
                        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                        os.replace(copy, self.folder / name)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _receive(self, name: str, file: ListedFile, copy: Path) -> None:
        if self._content(name) == file.content:
            return
        place = self._place(name, file)
        s3.receive(place, copy)
        if Content(copy.stat().st_size, sha256_file(copy)) != file.content:
            raise StorageError(
                f"{place}: not the file of {file.size} bytes and sha256 {file.sha256} that {self.list_uri} lists; "
                "remove both to make it anew"
            )

    def _remove(self, name: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        with suppress(OSError):  # up to the first that is not empty
            for folder in path.parents:
                if folder == self.folder:
                    break
                folder.rmdir()

    def _contents(self) -> dict[str, Content]:
        """Of every local file; also of what came meanwhile, which the content of others may rely on."""
        found: dict[str, Content | None] = {}
        while fresh := [name for name in finished_files(self.folder) if name not in found]:
            found |= zip(fresh, _in_parallel(self._content, fresh), strict=True)
        return {name: content for name, content in sorted(found.items()) if content}

    def _send(self, name: str, content: Content, listed: ListedFile | None) -> ListedFile | None:
        """What is to be listed of a local file, after sending it if need be; None for nothing."""
        if listed and listed.content == content:
            return listed
        file = ListedFile(size=content.size, sha256=content.sha256, waiting=token_hex(8) if listed else None)
        place = self._place(name, file)
        try:
            s3.send(self.folder / name, place)
        except OSError:
            if (now := self._content(name, afresh=True)) == content:
                raise
        else:
            if (now := self._content(name, afresh=True)) == content:
                return file
        s3.delete(place, [""])  # nobody knows what it holds
        return listed if now else None

    def _place(self, name: str, file: ListedFile) -> str:
        return join(self.lists, file.waiting) if file.waiting else join(self.uri, name)

    def _settle(self, files: Files) -> None:
        """Give files that wait beside the list their own names."""
        waiting = {name: file.waiting for name, file in files.items() if file.waiting}
        if not waiting:
            return
        _in_parallel(lambda name: s3.copy(join(self.lists, waiting[name]), join(self.uri, name)), waiting)
        self._write({name: file.model_copy(update={"waiting": None}) for name, file in files.items()})
        s3.delete(self.lists, list(waiting.values()))

    def _write(self, files: Files) -> None:
        s3.write(self.list_uri, FileList(files=files).model_dump_json(indent=2, exclude_none=True).encode())

    def _content(self, name: str, afresh: bool = False) -> Content | None:
        """Of a local file, None if there is none; read again only if it changed since, or ``afresh``."""
        path = self.folder / name
        try:
            state = path.stat()
            mark = (state.st_ino, state.st_size, state.st_ctime_ns)
            known = self._known.get(name)
            if known and known[0] == mark and not afresh:
                return known[1]
            settled = time.time() - state.st_ctime > SETTLED_SECONDS
            content = Content(state.st_size, sha256_file(path))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot read: {error.strerror or error}") from error
        if settled:
            self._known[name] = mark, content
        return content


def _in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, items))
