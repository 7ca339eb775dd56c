"""A model without its weights: built from its ``config.json`` alone, on PyTorch's ``meta`` device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError
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
from matvlm.models.locate import HUB_ID, PACKAGE, package_folder
from matvlm.storage import StorageError, join, read_json

HUB_SECONDS = 4.0
"""Patience with the hub. One attempt without a token is enough here; transformers tries for 20 s and more."""


class Unreachable(ValueError):
    """The teacher's architecture cannot be known here; the message is one line that says why."""


def build(teacher: Teacher) -> Any:
    """The teacher's model with shapes and types but no values.

    Raises:
        Unreachable: its config cannot be read, or transformers has no such architecture.
    """
    return _build(teacher.model, _read_config(teacher.model, teacher.revision), getattr(torch, teacher.dtype))


def build_uri(uri: str) -> Any:
    """The model at ``uri`` (see ``matvlm.models.locate.locate``), hybrid or not, in the dtype of its files.

    Raises:
        Unreachable: as ``build`` does.
    """
    hub_id = HUB_ID.fullmatch(uri)
    name, revision = (hub_id[1], hub_id[2]) if hub_id and not Path(uri).exists() else (uri, None)
    return _build(uri, _read_config(name, revision), None)


def build_plain(hybrid: Any) -> Any:
    """What ``hybrid`` was converted from: the same model with attention in every layer."""
    raw = hybrid.config.to_dict()
    raw["model_type"] = raw.pop(SECTION)["model_type"]
    return _build("the teacher", raw, hybrid.dtype)


def _build(name: str, raw: dict[str, Any], dtype: torch.dtype | None) -> Any:
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


def _read_config(name: str, revision: str | None) -> dict[str, Any]:
    try:
        if name.startswith(PACKAGE):
            raw = read_json(package_folder(name) / "config.json")
        elif name.startswith("s3://") or Path(name).is_dir():
            raw = read_json(join(name, "config.json"))
        else:
            raw = _read_from_hub(name, revision)
    except (StorageError, OSError, ValueError) as error:
        raise Unreachable(f"{name}: cannot read its config.json: {_one_line(error)}") from error
    if not isinstance(raw, dict):
        raise Unreachable(f"{name}: its config.json is not a JSON object")
    return raw


def _read_from_hub(name: str, revision: str | None) -> Any:
    """``config.json`` of a hub model, from the local hub cache if it is there.

    Raises:
        OSError: not cached and not to be had within ``HUB_SECONDS``.
    """
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return json.loads(Path(cached).read_text(encoding="utf-8"))
    if constants.HF_HUB_OFFLINE:
        raise OSError("it is not in the hub cache, and HF_HUB_OFFLINE is set")
    try:
        with urlopen(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_SECONDS) as answer:
            return json.load(answer)
    except URLError as error:
        raise OSError(f"the hub did not give it ({error})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
