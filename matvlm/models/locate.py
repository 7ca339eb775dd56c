"""From where a model is (``package://NAME``, ``s3://``, a folder, a hub id) to a local folder, and to the model."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.models import hybrid
from matvlm.models.auto import SECTION
from matvlm.models.folder import CONFIG, RELEASED_TYPE, ModelFolderError, is_released, read_object
from matvlm.storage import local_copy

PACKAGE = "package://"
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""What ``load`` may read; a hub model's code and pickles stay where they are."""


def locate(uri: str) -> Path:
    """The local folder of the model at ``uri``, fetched first if it is on S3 or on the Hugging Face hub.

    Args:
        uri: ``package://NAME`` (shipped with matvlm), ``s3://bucket/key``, a local folder or a hub id ``org/name``,
            also ``org/name@revision``; a local folder goes before a hub id of the same name.

    Raises:
        ModelFolderError: there is no such shipped model, or no such folder and the hub does not give it either.
        StorageError: nothing is at that path or S3 address, or it cannot be fetched.
    """
    if uri.startswith(PACKAGE):
        return package_folder(uri)
    hub_id = HUB_ID.fullmatch(uri)
    if hub_id and not Path(uri).exists():
        return _from_hub(hub_id[1], hub_id[2])
    return local_copy(uri)


def load(uri: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, Any]:
    """Model, in evaluation mode, and processor of ``uri``; see ``locate`` and ``hybrid.load``.

    The paper's own checkpoints also open in the layout that they were released in, see ``tinyllava.load``.
    ``dtype`` None keeps that of the files, except on a CPU, which is slow at half precision: there it is float32.

    Raises:
        ModelFolderError, StorageError: as ``locate``, ``hybrid.load`` and ``tinyllava.load`` do.
    """
    folder = locate(uri)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    if is_released(folder):
        from matvlm.models import tinyllava

        return tinyllava.load(folder, dtype, device)
    return hybrid.load(folder, dtype, device)


def describe(uri: str, label: str) -> Checkpoint:
    """What the model folder at ``uri`` says of itself: replaced layers, initialisation, updates; no weights are read.

    Raises:
        ModelFolderError, StorageError: as ``locate`` does, or its config.json is missing or is not JSON.
    """
    folder = locate(uri)
    config = read_object(folder / CONFIG)
    if config.get("model_type") == RELEASED_TYPE:
        from matvlm.models import tinyllava

        layers = tinyllava.mixer_layers(folder)
        return Checkpoint(uri=uri, label=label, init=tinyllava.INIT if layers else None, layers=layers)
    section = config.get(SECTION) or {}
    return Checkpoint(
        uri=uri,
        label=label,
        init=section.get("init"),
        layers=section.get("layers", []),
        updates=section.get("provenance", {}).get("updates", 0),
    )


def package_folder(uri: str) -> Path:
    """The folder of a model that ships with matvlm.

    Raises:
        ModelFolderError: none has that name; the message lists those that ship.
    """
    assets = Path(str(files("matvlm"))) / "assets"
    shipped = {folder.name: folder for folder in assets.glob("*") if (folder / CONFIG).is_file()}
    name = uri.removeprefix(PACKAGE)
    if name not in shipped:
        raise ModelFolderError(
            f"{uri}: matvlm ships no model {name!r}; it ships: {', '.join(sorted(shipped)) or 'none'}"
        )
    return shipped[name]


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # among them those of the HTTP client, whichever that is
        reason = " ".join(str(error).split())
        raise ModelFolderError(
            f"{name}: no such local folder, and the hub does not give a model of this name: {reason}"
        ) from error
