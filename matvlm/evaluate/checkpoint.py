"""The model that is evaluated: opened, and known again by a hash of all that decides its answers."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import torch

from matvlm.evaluate.results import EvaluationError
from matvlm.models import locate

NO_PART_OF_THE_MODEL = {"_name_or_path", "_commit_hash", "transformers_version"}


def open_checkpoint(uri: str, device: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Model and processor of ``uri``, as ``locate.load`` does.

    Raises:
        EvaluationError: it cannot be opened, or has no image processor or chat template.
    """
    try:
        model, processor = locate.load(uri, device, dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(f"{uri}: cannot open this checkpoint: {error}") from error
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise EvaluationError(f"{uri}: needs an image processor and a chat template to answer questions")
    return model, processor


def model_hash(model: Any, processor: Any) -> str:
    """Hexadecimal sha256 over weights, configuration, generation settings and processor, wherever they came from."""
    from matvlm.targets.identity import template_hash
    from matvlm.teacher import fingerprint

    settings = [_own(config.to_dict()) for config in (model.config, model.generation_config) if config is not None]
    parts = [fingerprint(model), json.dumps(settings, sort_keys=True, default=str), template_hash(processor)]
    return sha256("\n".join(parts).encode()).hexdigest()


def _own(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _own(part) for name, part in value.items() if name not in NO_PART_OF_THE_MODEL}
    return value
