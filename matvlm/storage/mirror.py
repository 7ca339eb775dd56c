"""A run's folder for steps that work on local files, where the run is on S3 and a step's machine has nothing of it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path, PurePosixPath
from types import TracebackType

from matvlm.storage import s3
from matvlm.storage.atomic import StorageError, cannot_write
from matvlm.storage.names import Uri, folder_name, is_below, join, local_path, s3_uri
from matvlm.storage.part import LIST, LISTS, Part

INTERVAL = 60.0
"""Seconds between two pushes: the most that a killed step loses."""

log = logging.getLogger(__name__)


class Mirror:
    """The folder ``uri`` as a local one, ``folder``: the same where it is local, else a copy of the parts in use.

    A part is a folder below it; parts do not lie in one another. Any number of tasks may use the folder at once, but a
    part has one writer at a time, and whoever reads it on the writer's machine does so after that.

    What is on S3 is what holds. A part that is opened or fetched loses the local files that its list does not have, and
    those that differ are replaced: a retry goes on from the last push on whatever machine it is, and not from what a
    killed attempt had on one of them. Only a part that was never pushed keeps what is here.

    Used as a context, it pushes every ``INTERVAL`` seconds and at the end, also after an error of the block. A block in
    another one only pushes at its end.
    """

    def __init__(self, uri: Uri):
        self._remote = s3_uri(uri) is not None
        self.uri = join(uri) if self._remote else os.fspath(uri)
        self.folder = (s3.cache() / folder_name(self.uri)).resolve() if self._remote else local_path(uri)
        self._open: dict[str, Part] = {}
        self._pushing = threading.Lock()
        self._over = threading.Event()
        self._pusher: threading.Thread | None = None
        self._blocks = 0

    def open(self, *parts: str) -> Path:
        """The local path of a part that is written from now on, with what the store has of it; its parent exists.

        Raises:
            StorageError: it cannot be fetched, or lies in another open part or around it.
        """
        path, name = Path(self.folder, *parts), "/".join(parts)
        if self._remote and name not in self._open:
            part = self._fetched(name)
            part.clear_remains()
            self._open[name] = part
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path

    def fetch(self, *parts: str) -> Path:
        """The local path of a part to read, with what the store has of it; as it is if it is open.

        Raises:
            StorageError: see ``open``.
        """
        name = "/".join(parts)
        if self._remote and name not in self._open:
            self._fetched(name)
        return Path(self.folder, *parts)

    def parts(self, below: str) -> list[str]:
        """Of the folder ``below``, the parts that were pushed, by name; none where ``uri`` is local.

        Raises:
            StorageError: they cannot be listed.
        """
        if not self._remote:
            return []
        names = s3.objects(join(self.uri, LISTS, below))
        return sorted(f"{below}/{PurePosixPath(name).parent}" for name in names if PurePosixPath(name).name == LIST)

    def push(self) -> None:
        """Send what is new or changed in the open parts.

        Raises:
            StorageError: one of them cannot be sent; the others are.
        """
        errors = []
        with self._pushing:
            for part in list(self._open.values()):
                try:
                    part.push()
                except StorageError as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    def uri_of(self, path: str | os.PathLike[str]) -> str:
        """The URI of a local path in ``folder``.

        Raises:
            StorageError: it is outside.
        """
        if not self._remote:
            return os.fspath(path)
        below = Path(os.path.abspath(path))
        if not below.is_relative_to(self.folder):
            raise StorageError(f"{path}: not in the folder {self.folder} of {self.uri}")
        return join(self.uri, *below.relative_to(self.folder).parts)

    def __enter__(self) -> Mirror:
        self._blocks += 1
        if self._remote and self._blocks == 1:
            self._over.clear()
            self._pusher = threading.Thread(target=self._push_regularly, name="mirror", daemon=True)
            self._pusher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks -= 1
        if self._pusher and not self._blocks:
            self._over.set()
            self._pusher.join()
        try:
            self.push()
        except Exception as failure:
            if error is None:
                raise
            log.warning("%s: what is new was not sent: %s", self.uri, failure)

    def _push_regularly(self) -> None:
        while not self._over.wait(INTERVAL):
            try:
                self.push()
            except Exception as error:  # the next time may do better
                log.warning("%s: cannot send now, trying again in %g s: %s", self.uri, INTERVAL, error)

    def _fetched(self, name: str) -> Part:
        path = PurePosixPath(name)
        if not is_below(name):
            raise StorageError(f"{self.uri}: {name!r} is no folder below it")
        for other in self._open:
            if path.is_relative_to(other) or PurePosixPath(other).is_relative_to(path):
                raise StorageError(f"{self.uri}: {name} and {other}, which is open, lie in one another; use one part")
        part = Part(self.uri, self.folder, name)
        part.fetch()
        return part
