"""What a model folder says of itself in its JSON files and tensor names, read without building a model."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from matvlm.models.auto import SECTION
from matvlm.models.mixer import MixerOptions
from matvlm.storage import StorageError, read_json

CONFIG = "config.json"
RELEASED_TYPE = "tinyllava"
"""``model_type`` of the paper's own checkpoints in the layout of their release, see ``matvlm.models.tinyllava``."""
FORMAT = 2
"""Of the ``matvlm`` section of a hybrid's config.json."""


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message names it, what is wrong there and what to do."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ModelFolderError: it is missing, cannot be read or is no JSON object.
    """
    try:
        raw = read_json(path)
    except StorageError as error:
        raise ModelFolderError(str(error)) from None
    if not isinstance(raw, dict):
        raise ModelFolderError(f"{path}: not a JSON object")
    return raw


def is_released(folder: Path) -> bool:
    """Whether ``folder`` has the released layout; only its config.json is read, and False if that cannot be."""
    try:
        return read_object(folder / CONFIG).get("model_type") == RELEASED_TYPE
    except ModelFolderError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model, all of which exist; none if the weights are in another format.

    Raises:
        ModelFolderError: the index is damaged, or names a file that is not there or of another format.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        foreign = [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]
    except (ModelFolderError, KeyError, AttributeError, TypeError) as error:
        raise ModelFolderError(f"{index}: damaged: {error!r}; fetch the model again") from None
    if foreign:
        raise ModelFolderError(f"{index}: names files that are no safetensors of this folder: {', '.join(foreign)}")
    if missing:
        raise ModelFolderError(f"{folder}: not there, but in {index.name}: {', '.join(missing)}; fetch the model again")
    return [folder / name for name in names]


def check_section(folder: Path, section: Any) -> None:
    """Check the ``matvlm`` section of the config in ``folder``.

    Raises:
        ModelFolderError: it cannot be understood, or names other layers than the tensors hold mixers for.
    """
    where = f"{folder / CONFIG}: {SECTION}"
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        found = section.get("format") if isinstance(section, dict) else section
        raise ModelFolderError(f"{where}.format is {found!r}, expected {FORMAT}: written by another version of matvlm")
    layers, options = section.get("layers"), section.get("mixers")
    if not isinstance(layers, list) or not isinstance(options, dict) or {str(i) for i in layers} != options.keys():
        raise ModelFolderError(f"{where}: layers and mixers must name the same layers, got {layers!r} and {options!r}")
    names = {field.name for field in fields(MixerOptions)}
    for index, values in options.items():
        if names ^ values.keys():
            odd = sorted(names ^ values.keys())
            raise ModelFolderError(f"{where}.mixers.{index}: missing or unknown options {odd}")
    found = _layers_with_mixers(folder)
    if found != sorted(layers):
        raise ModelFolderError(f"{where}.layers is {layers}, but the tensors hold mixers for the layers {found}")


def _layers_with_mixers(folder: Path) -> list[int]:
    found = set()
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as tensors:
                matches = [re.search(r"layers\.(\d+)\.self_attn\.A_log$", name) for name in tensors.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{path}: damaged: {error}") from error
        found |= {int(match.group(1)) for match in matches if match}
    return sorted(found)
