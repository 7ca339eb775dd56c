"""What decides the content of a target store, as one comparable value."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from matvlm.artifacts import Artifact, DataManifest
from matvlm.config import Positions, Recipe, Scheme


class TargetError(ValueError):
    """A target store that cannot be used: the message names the store, the shard or field, and what to do."""


class Identity(Artifact):
    """Everything that decides the content of a store; two stores are the same exactly when all fields are equal."""

    teacher: str
    """``teacher.fingerprint`` of the weights."""
    data: str
    """``DataManifest.fingerprint``."""
    template: str
    """sha256 over chat template, vocabulary and image settings of the processor."""
    max_length: int
    max_turns: int | None
    top_k: int
    temperature: float
    positions: Positions = "answer"
    scheme: Scheme = "topk_tail"
    samples: int | None = None
    """Draws a position, and the ``seed`` that decides them with a sample's id; None for a scheme without draws."""
    seed: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, data: DataManifest, processor: Any, teacher: str) -> Identity:
        """The identity of the store that ``recipe`` needs; ``teacher`` is the fingerprint of its weights."""
        return cls(
            teacher=teacher, data=data.fingerprint, template=template_hash(processor), **content_settings(recipe)
        )

    @property
    def sha256(self) -> str:
        unused = {"samples", "seed"} if self.scheme == "topk_tail" else None
        return hashlib.sha256(self.model_dump_json(exclude=unused).encode()).hexdigest()

    def differences(self, run: Identity) -> str:
        """``field: store has X, run has Y`` for every field in which this store's identity differs from ``run``'s."""
        store = self.model_dump()
        return "; ".join(
            f"{field}: store has {store[field]!r}, run has {value!r}"
            for field, value in run.model_dump().items()
            if store[field] != value
        )


def content_settings(recipe: Recipe) -> dict[str, Any]:
    """The fields of an ``Identity`` that the recipe decides; recipes that agree in them can share a store."""
    settings = recipe.targets
    draws = {"samples": settings.samples, "seed": recipe.seed} if settings.scheme == "topk_sampled" else {}
    return {
        "max_length": recipe.data.max_length,
        "max_turns": recipe.data.max_turns,
        "top_k": settings.top_k,
        "temperature": recipe.distill.loss.temperature,
        "positions": settings.positions,
        "scheme": settings.scheme,
        **draws,
    }


def refuse_other(store: Identity, run: Identity, where: str) -> None:
    """Raise a ``TargetError`` that names every differing field unless both are equal; ``where`` is the store's."""
    if store != run:
        raise TargetError(
            f"{where}: targets of something else ({store.differences(run)}); use another folder or remove this one"
        )


def template_hash(processor: Any) -> str:
    """Covers what decides token ids and pixels; not which implementation of the image processor is installed."""
    images = {k: v for k, v in processor.image_processor.to_dict().items() if not k.endswith(("_type", "_class"))}
    own = {k: v for k, v in vars(processor).items() if isinstance(v, str | int | float | dict)}
    vocabulary = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([images, own, vocabulary], sort_keys=True, default=str).encode()).hexdigest()
