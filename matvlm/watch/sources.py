"""Where checkpoints appear: a model of the MLflow registry, or a folder, local or on S3. Both can carry marks.

A mark is a short text under a key that stays with a checkpoint: a tag of its version, or a file beside the folder's
checkpoints. Writing one shows at once to whoever reads; nothing else is asked of a source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from matvlm.storage import MissingError, join, list_files, read_bytes, remove, write_bytes
from matvlm.tracking import TrackingError, tracking_uri
from matvlm.tracking.address import public_uri
from matvlm.tracking.registry import SCHEME
from matvlm.tracking.store import open_client, patience

CONFIG = "config.json"
MARKS = ".watched"
"""The folder of a folder's marks."""
ITSELF = "_"
"""Stands for a folder that is a checkpoint itself."""
PATIENCE_SECONDS = 60


class Source(Protocol):
    """Checkpoints, named as ``matvlm`` opens them, with their marks."""

    name: str

    def found(self) -> dict[str, set[str]]:
        """Every checkpoint, the oldest first, with the keys of its marks."""

    def marks(self, checkpoint: str) -> dict[str, str]:
        """Its marks by key."""

    def mark(self, checkpoint: str, key: str, text: str) -> None:
        """Set a mark, in the place of one with the same key."""

    def unmark(self, checkpoint: str, key: str) -> None:
        """Take a mark away; fine if there is none."""


class RegisteredModel:
    """The versions of the registered model ``name``; there need not be any yet.

    Raises:
        TrackingError: from every method, if MLflow cannot be reached or refuses.
    """

    def __init__(self, model: str, uri: str | None = None):
        self.model, self.uri = model, tracking_uri(uri)
        self.name = f"{SCHEME}{model} in MLflow at {public_uri(self.uri)}"

    def found(self) -> dict[str, set[str]]:
        found, page = [], None
        with self._client() as client:
            while page != "":
                some = client.search_model_versions(f"name = '{self.model}'", page_token=page)
                found += some
                page = some.token or ""
        found.sort(key=lambda version: int(version.version))
        return {f"{SCHEME}{self.model}/{version.version}": set(version.tags) for version in found}

    def marks(self, checkpoint: str) -> dict[str, str]:
        with self._client() as client:
            return dict(client.get_model_version(self.model, self._number(checkpoint)).tags)

    def mark(self, checkpoint: str, key: str, text: str) -> None:
        with self._client() as client:
            client.set_model_version_tag(self.model, self._number(checkpoint), key, text)

    def unmark(self, checkpoint: str, key: str) -> None:
        if key in self.marks(checkpoint):
            with self._client() as client:
                client.delete_model_version_tag(self.model, self._number(checkpoint), key)

    @contextmanager
    def _client(self) -> Iterator[Any]:
        try:
            with patience(PATIENCE_SECONDS):
                yield open_client(self.uri)
        except Exception as error:
            raise TrackingError(f"{self.name}: {error}") from error

    def _number(self, checkpoint: str) -> str:
        return checkpoint.rpartition("/")[2]


class Folder:
    """The model folders at any depth below ``uri``, in the order of their names; it need not be there yet.

    A model folder is there as soon as its config.json is, so whoever copies one by hand copies that last.

    Raises:
        StorageError: from every method, if it cannot be reached, read or written.
    """

    def __init__(self, uri: str):
        self.name = uri if uri.endswith("://") else uri.rstrip("/")

    def found(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        marks: dict[str, set[str]] = {}
        for name in list_files(self.name):
            folder, _, file = name.rpartition("/")
            if name.startswith(f"{MARKS}/"):
                marks.setdefault(folder.removeprefix(f"{MARKS}/"), set()).add(file)
            elif file == CONFIG:
                found[folder] = set()
        return {join(self.name, folder).rstrip("/"): marks.get(folder or ITSELF, set()) for folder in sorted(found)}

    def marks(self, checkpoint: str) -> dict[str, str]:
        place, marks = self._place(checkpoint), {}
        for key in list_files(place):
            try:
                marks[key] = read_bytes(join(place, key)).decode()
            except MissingError:
                continue  # taken away between the two
        return {key: text for key, text in marks.items() if "/" not in key}

    def mark(self, checkpoint: str, key: str, text: str) -> None:
        write_bytes(join(self._place(checkpoint), key), text.encode())

    def unmark(self, checkpoint: str, key: str) -> None:
        remove(join(self._place(checkpoint), key))

    def _place(self, checkpoint: str) -> str:
        return join(self.name, MARKS, checkpoint.removeprefix(self.name).strip("/") or ITSELF)
