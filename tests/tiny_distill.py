"""A tiny teacher with data, targets and an untrained student: all that a distillation of seconds needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tiny_teacher import TINY

from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import open_dataset, prepare, turns_of
from matvlm.distill import distill, init_student
from matvlm.models import hybrid, locate
from matvlm.models.small import build_model, build_processor, build_tokenizer
from matvlm.reporting import Reporter
from matvlm.targets import Identity, ShardMaker, join_shards
from matvlm.teacher import fingerprint

SIZES = TINY.model_copy(update={"layers": 4})
REPLACED = [0, 2]
TALK = [("what shape is the image", "circle"), ("is there a circle", "yes there is one"), ("what color", "red")]
NUM_SAMPLES = 11
TOP_K = 1000
"""More than the vocabulary, so that the sparse divergence is the dense one."""


class Stage(NamedTuple):
    """Everything that ``distill`` is called with, made once."""

    recipe: Recipe
    student: Checkpoint
    teacher: Checkpoint
    data: DataManifest
    targets: TargetStore

    def run(self, folder: Path, reporter: Reporter | None = None, recipe: Recipe | None = None, **other: Any) -> Any:
        given = self._asdict() | {"recipe": recipe or self.recipe} | other
        return distill(**given, folder=folder, reporter=reporter or Reporter(), device="cpu")

    def but(self, **distill_fields: Any) -> Recipe:
        """The recipe with other fields of ``distill``; ``loss`` and ``optimizer`` are mappings of what changes."""
        changed = self.recipe.model_dump()
        for name, value in distill_fields.items():
            old = changed["distill"][name]
            changed["distill"][name] = {**old, **value} if isinstance(value, dict) else value
        return Recipe.model_validate(changed)


def make_stage(folder: Path, dtype: str = "float32", autocast: str = "off", seed: int = 0) -> Stage:
    """A random teacher, eleven pictures of one to three questions, targets, a hybrid with two mixers in four layers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    samples = []
    for number in range(NUM_SAMPLES):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = TALK[: 1 + number % 3]
        talk = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        samples.append({"image": f"{number}.png", "conversations": talk})
    (folder / "talk.json").write_text(json.dumps(samples))
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "teacher": {"model": str(folder / "teacher"), "dtype": dtype},
            "data": {"source": "llava", "path": str(folder / "talk.json"), "max_length": 64},
            "hybrid": {"layers": REPLACED, "init": "paper", "chunk_size": 8},
            "targets": {"top_k": TOP_K, "shards": 2, "batch_size": 4},
            "distill": {
                "engine": "torch",
                "batch_size": 4,
                "micro_batch_size": 2,
                "epochs": 2,
                "loss": {"prob": 1.0, "layer": 0.5, "ce": 0.25, "temperature": 2.0},
                "optimizer": {"lr": 1e-2, "clip_grad_norm": 1.0},
                "schedule": {"warmup_updates": 2, "decay_updates": 2, "final_lr_share": 0.1},
                "autocast": autocast,
                "checkpoint_every_updates": 2,
                "log_every_updates": 1,
            },
        }
    )
    tokenizer = build_tokenizer([text for turn in TALK for text in turn])
    model = build_model(SIZES, tokenizer, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # peaky, as a trained model is
    hybrid.save(model, build_processor(SIZES, tokenizer), folder / "teacher", {})
    teacher = Checkpoint(uri=str(folder / "teacher"), label="teacher")
    data = prepare(recipe.data, 0, folder / "data")
    student = init_student(recipe, teacher, "paper", data, folder / "student")
    return Stage(recipe, student, teacher, data, make_targets(recipe, teacher, data, folder / "targets"))


def make_targets(recipe: Recipe, teacher: Checkpoint, data: DataManifest, folder: Path) -> TargetStore:
    model, processor = locate.load(teacher.uri, dtype=getattr(torch, recipe.teacher.dtype))
    identity = Identity.of(recipe, data, processor, fingerprint(model))
    shards = recipe.targets.shards
    maker = ShardMaker(model, Encoder(processor), open_dataset(data), recipe.targets, str(folder), identity)
    maker.make(range(shards))
    return join_shards(str(folder), shards, identity)


class Kept(Reporter):
    """Keeps the metrics by update, and calls ``then`` after those of update ``at``.

    ``computed`` are the updates made by the run that reports; those before a snapshot come without speed.
    """

    def __init__(self, at: int = 0, then: Any = None):
        self.at, self.then, self.seen = at, then, dict[int, dict[str, float]]()
        self.computed: list[int] = []

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        timeless = {name for name in values if name.startswith("loss")} | {"lr", "grad_norm"}
        self.computed += [step] if "samples_per_second" in values else []
        self.seen[step] = {name: value for name, value in values.items() if name in timeless}
        if step == self.at:
            self.then()


def batch_of(stage: Stage, rows: list[int]) -> Batch:
    _, processor = locate.load(stage.teacher.uri)
    encoder, dataset = Encoder(processor), open_dataset(stage.data)
    chosen = [dataset[row] for row in rows]
    return encoder.collate([encoder.encode(row["id"], row["image"], turns_of(row)) for row in chosen])


def is_mixers(name: str) -> bool:
    return any(f"layers.{index}.self_attn." in name and "language_model" in name for index in REPLACED)
