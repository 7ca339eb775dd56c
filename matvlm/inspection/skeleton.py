"""A model without its weights: built from its JSON files alone, on PyTorch's ``meta`` device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from matvlm.config import Teacher
from matvlm.models.auto import SECTION
from matvlm.models.folder import CONFIG, RELEASED_TYPE, ModelFolderError
from matvlm.models.locate import HUB_ID, PACKAGE, package_folder
from matvlm.storage import StorageError, exists, join, read_json

HUB_SECONDS = 4.0
"""Patience with the hub. One attempt without a token is enough here; transformers tries for 20 s and more."""


class Unreachable(ValueError):
    """The teacher's architecture cannot be known here; the message is one line that says why."""


class Missing(Unreachable):
    """The model has no file of this name."""


def build(teacher: Teacher) -> Any:
    """The teacher's model with shapes and types but no values.

    Raises:
        Unreachable: its config cannot be read, or transformers has no such architecture.
    """
    return _build(teacher.model, teacher.revision, getattr(torch, teacher.dtype))


def build_uri(uri: str) -> Any:
    """The model at ``uri`` (see ``matvlm.models.locate.locate``), hybrid or not, in the dtype of its files.

    Raises:
        Unreachable: as ``build`` does.
    """
    hub_id = HUB_ID.fullmatch(uri)
    name, revision = (hub_id[1], hub_id[2]) if hub_id and not Path(uri).exists() else (uri, None)
    return _build(name, revision, None)


def build_plain(hybrid: Any) -> Any:
    """What ``hybrid`` was converted from: the same model with attention in every layer."""
    raw = hybrid.config.to_dict()
    raw["model_type"] = raw.pop(SECTION)["model_type"]
    return _build_family("the teacher", raw, hybrid.dtype)


def _build(name: str, revision: str | None, dtype: torch.dtype | None) -> Any:
    raw = _read(name, revision, CONFIG)
    if raw.get("model_type") == RELEASED_TYPE:
        return _build_released(name, revision, raw, dtype)
    return _build_family(name, raw, dtype)


def _build_released(name: str, revision: str | None, raw: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """The model of one of the paper's checkpoints in the layout of its release; a student has a file more."""
    from matvlm.models import tinyllava

    try:
        mixers = _read(name, revision, tinyllava.MIXERS)
    except Missing:
        mixers = None
    try:
        config = tinyllava.parse_config(raw, join(name, CONFIG))
        options = tinyllava.parse_mixers(mixers, join(name, tinyllava.MIXERS), config) if mixers is not None else {}
    except ModelFolderError as error:
        raise Unreachable(str(error)) from error
    return tinyllava.skeleton(config, options).to(dtype or config.dtype or torch.float32).eval()


def _build_family(name: str, raw: dict[str, Any], dtype: torch.dtype | None) -> Any:
    model_type = str(raw.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise Unreachable(f"{name}: transformers has no architecture {model_type!r}")
    config = CONFIG_MAPPING[model_type].from_dict(raw)
    has_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
    if dtype is None:
        dtype = config.dtype or torch.float32
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype).eval()


def _read(name: str, revision: str | None, file: str) -> dict[str, Any]:
    """The JSON object in ``file`` of a model.

    Raises:
        Missing: the model has no such file.
        Unreachable: it cannot be read.
    """
    try:
        if name.startswith(("s3://", PACKAGE)) or Path(name).is_dir():
            place = join(package_folder(name) if name.startswith(PACKAGE) else name, file)
            if not exists(place):
                raise FileNotFoundError("no such file")
            raw = read_json(place)
        else:
            raw = _read_from_hub(name, revision, file)
    except (StorageError, OSError, ValueError) as error:
        kind = Missing if isinstance(error, FileNotFoundError) else Unreachable
        raise kind(f"{name}: cannot read its {file}: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise Unreachable(f"{name}: its {file} is not a JSON object")
    return raw


def _read_from_hub(name: str, revision: str | None, file: str) -> Any:
    """The JSON in ``file`` of a hub model; where the local hub cache has its config.json, then from there.

    Raises:
        FileNotFoundError: the model has no such file.
        OSError: not cached and not to be had within ``HUB_SECONDS``.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(name, CONFIG, revision=revision)
    if isinstance(cached, str):
        return json.loads((Path(cached).parent / file).read_text(encoding="utf-8"))
    if constants.HF_HUB_OFFLINE:
        raise OSError("it is not in the hub cache, and HF_HUB_OFFLINE is set")
    try:
        with urlopen(hf_hub_url(name, file, revision=revision), timeout=HUB_SECONDS) as answer:
            return json.load(answer)
    except URLError as error:
        kind = FileNotFoundError if isinstance(error, HTTPError) and error.code == 404 else OSError
        raise kind(f"the hub did not give it ({error})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
