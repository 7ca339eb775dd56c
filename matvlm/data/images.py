"""Image files by the names that a source gives them: in a folder or in tar archives, local or in S3.

Nothing is unpacked. The headers of an archive are read once, when the data are prepared; from then on a row says at
which byte of which archive its image lies, and that part alone is read.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import EpsImagePlugin, Image

from matvlm.data.rows import BadSample, DataError, StoredImage
from matvlm.storage import MissingError, StorageError, join, list_names, open_file, read_bytes

EpsImagePlugin.gs_binary = False  # an EPS file is a program, which Pillow would have Ghostscript run

TAR = "tar:"
ARCHIVES_AT_ONCE = 8

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Part(NamedTuple):
    """A member of a tar archive: ``size`` bytes of ``archive`` from ``offset`` on."""

    archive: str
    offset: int
    size: int


class ImageFolder:
    """Finds images by name. ``place`` is one of these, local or ``s3://``:

    a folder that names are relative to; a folder of .tar files or a pattern of such (``images-{000..012}.tar``,
    ``images-*.tar``), whose members they name. A folder that holds both is looked up in its archives first.

    Raises:
        DataError: an archive is damaged, compressed or missing, or two archives have a member of the same name.
        StorageError: S3 cannot be reached.
    """

    def __init__(self, place: str):
        self.place = place
        pattern = place.rstrip("/").lower().endswith((".tar", *_COMPRESSED)) and not Path(place).is_dir()
        self.folder = None if pattern else place
        self.members = _index(_archives_of(place) if pattern else _archives_in(place))

    def find(self, name: str, where: str) -> StoredImage:
        """Where the image ``name`` is; a file need not exist.

        Raises:
            BadSample: ``place`` is archives only, and none of them has that member; or ``name`` leads out of it.
        """
        part = self.members.get(posixpath.normpath(name))
        if part is not None:
            path = TAR + json.dumps([*part, name], ensure_ascii=False)
        elif self.folder is None:
            raise BadSample("missing image", f"{where}: no archive of {self.place} has the member {name!r}")
        else:
            path = _inside(self.folder, name, where)
        return {"bytes": None, "path": path}


def read_image(image: StoredImage, where: str) -> bytes:
    """The content of the image file.

    Raises:
        BadSample: it is not there, or cannot be read.
        StorageError: S3 cannot be reached.
    """
    if image["bytes"] is not None:
        return image["bytes"]
    path = image["path"] or ""
    part = json.loads(path.removeprefix(TAR))[:3] if path.startswith(TAR) else [path]
    try:
        return read_bytes(*part)
    except (StorageError, ValueError) as error:  # ValueError: a name with a null byte
        if _out_of_reach(part[0], error):
            raise
        raise BadSample("missing image", f"{where}: {name_of(image)}: {error}") from None


def decode(content: bytes, image: StoredImage, where: str) -> Image.Image:
    """``content`` of ``image`` as RGB pixels.

    Raises:
        BadSample: it is no image, or a damaged one.
    """
    import datasets

    try:
        pixels: Image.Image = datasets.Image(mode="RGB").decode_example({"bytes": content, "path": None})
    except Exception as error:  # Pillow has no common error: OSError, SyntaxError, struct.error, ...
        raise BadSample("broken image", f"{where}: {name_of(image)}: {error}") from None
    return pixels


def name_of(image: StoredImage) -> str:
    """``image`` for a message: its file, or its archive and member."""
    path = image["path"]
    if path and path.startswith(TAR):
        archive, *_, member = json.loads(path.removeprefix(TAR))
        return f"{archive}, member {member}"
    return path or "its image"


def is_inside(path: str, folder: str) -> bool:
    """Whether the local ``path`` is below ``folder`` by its name; a link in there is the word of the folder's owner."""
    parents = (os.path.abspath(folder), os.path.realpath(folder))
    return any(Path(os.path.abspath(path)).is_relative_to(parent) for parent in parents)


def is_own_file(path: str, source: str) -> bool:
    """Whether the local ``path`` is of the data at ``source``: below that folder, or what the hub gave of that id."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = [source] if Path(source).is_dir() else [str(datasets.config.HF_DATASETS_CACHE), HF_HUB_CACHE]
    return any(is_inside(path, folder) for folder in folders)


def _inside(folder: str, name: str, where: str) -> str:
    """The file ``name`` of ``folder``, without ``..`` in it.

    Raises:
        BadSample: it is not below ``folder``.
    """
    remote = folder.startswith("s3://")
    path = _join(folder, posixpath.normpath(name.lstrip("/") if remote else name))
    if ".." in path.removeprefix(folder).split("/") if remote else not is_inside(path, folder):
        raise BadSample("image outside its folder", f"{where}: {name!r} leads out of {folder} (data.image_folder)")
    return path


def _join(folder: str, name: str) -> str:
    """The file ``name`` of ``folder``; a local one as an absolute path."""
    return join(folder, name) if folder.startswith("s3://") else str((Path(folder) / name).absolute())


def _out_of_reach(uri: str, error: Exception) -> bool:
    """Whether S3 is what is wrong, and not what was asked for."""
    return uri.startswith("s3://") and isinstance(error, StorageError) and not isinstance(error, MissingError)


def _archives_in(folder: str) -> list[str]:
    """The archives directly in ``folder``; none, also where there is no folder: each of its images will be missing."""
    try:
        found = list_names(folder)
    except StorageError as error:
        if _out_of_reach(folder, error):
            raise
        return []
    archives = [_join(folder, name) for name in found if name.lower().endswith((".tar", *_COMPRESSED))]
    return _uncompressed(archives)


def _archives_of(pattern: str) -> list[str]:
    """The archives that ``pattern`` means, at least one."""
    folder, _, name = pattern.rpartition("/")
    archives = []
    for one in _numbers_in(name):
        wildcard = any(mark in one for mark in "*?[")
        try:
            archives += [_join(folder, found) for found in (list_names(folder or ".", one) if wildcard else [one])]
        except StorageError as error:
            if _out_of_reach(folder, error):
                raise
            raise DataError(f"{pattern}: cannot read the folder of data.image_folder: {error}") from None
    if not archives:
        raise DataError(f"{pattern}: no file fits this pattern (data.image_folder)")
    return _uncompressed(archives)


def _uncompressed(archives: list[str]) -> list[str]:
    for archive in archives:
        if archive.lower().endswith(_COMPRESSED):
            raise DataError(
                f"{archive}: a compressed archive cannot be read in parts (data.image_folder): unpack it to a .tar"
            )
    return archives


def _numbers_in(name: str) -> list[str]:
    """``a-{08..10}`` -> a-08, a-09, a-10."""
    found = _RANGE.search(name)
    if not found:
        return [name]
    first, last = found.groups()
    return [
        one
        for number in range(int(first), int(last) + 1)
        for one in _numbers_in(f"{name[: found.start()]}{number:0{len(first)}d}{name[found.end() :]}")
    ]


def _index(archives: list[str]) -> dict[str, Part]:
    """Every member of ``archives`` by its name; of a name that one archive has twice, the last, as tar does."""
    index: dict[str, Part] = {}
    with ThreadPoolExecutor(ARCHIVES_AT_ONCE) as pool:
        for members in pool.map(lambda archive: dict(_members(archive)), archives):
            if twice := index.keys() & members.keys():
                name = min(twice)
                raise DataError(
                    f"{members[name].archive}: member {name!r} is also in {index[name].archive}, so the name does not "
                    "say which image is meant (data.image_folder)"
                )
            index |= members
    return index


def _members(archive: str) -> Iterator[tuple[str, Part]]:
    try:
        with open_file(archive) as file:
            yield from _headers(archive, file)
    except (OSError, tarfile.TarError) as error:
        if _out_of_reach(archive, error):
            raise
        raise DataError(f"{archive}: cannot be read as an uncompressed tar (data.image_folder): {error}") from None


def _headers(archive: str, file: Any) -> Iterator[tuple[str, Part]]:
    with tarfile.open(fileobj=file, mode="r:") as opened:
        while (member := opened.next()) is not None:
            opened.members.clear()  # type: ignore[attr-defined]  # it would remember every member
            if member.isreg() and not member.issparse():
                yield posixpath.normpath(member.name), Part(archive, member.offset_data, member.size)
        file.seek(opened.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):  # tarfile takes both for an end
        raise tarfile.ReadError(f"damaged or cut off at byte {opened.offset:,}")
