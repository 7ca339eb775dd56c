"""An untrained tiny VLM with a few samples, as a teacher whose targets can be computed in milliseconds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor

from matvlm.artifacts import TargetStore
from matvlm.config import Targets
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.placed import PlacedImage
from matvlm.data.prepare import turns_of
from matvlm.losses import bucket_logprobs
from matvlm.models.small import SmallVLM, build_model, build_processor, build_tokenizer
from matvlm.reporting import Reporter
from matvlm.targets import Identity, SampleTargets, ShardMaker, join_shards

TINY = SmallVLM(
    image_size=16,
    vision_hidden=32,
    vision_layers=1,
    vision_heads=2,
    vision_mlp=32,
    hidden=32,
    layers=2,
    heads=2,
    mlp=32,
)
WORDS = ["what shape is the image circle square triangle color red blue green yes no there a one two three four"]
TOP_K = 6
SETTINGS = Targets(top_k=TOP_K, shards=2, batch_size=2)

Row = dict[str, Any]


class Teacher:
    """An untrained tiny VLM, its encoder, seven samples of one to three turns, and their store's identity."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer(WORDS)
        self.processor = build_processor(TINY, tokenizer)
        self.encoder = Encoder(self.processor, max_length=64)
        self.model = build_model(TINY, tokenizer)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(100)  # peaky, as a trained model is
        generator = torch.Generator().manual_seed(0)
        self.rows = [self._row(i, generator) for i in range(7)]
        self.dataset = as_dataset(self.rows)
        self.identity = Identity(
            teacher="one", data="d", template="t", max_length=64, max_turns=None, top_k=TOP_K, temperature=2.0
        )

    def _row(self, number: int, generator: torch.Generator) -> Row:
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        questions = ["what shape is the image", "is there a circle", "what color"]
        answers = ["circle", "yes there is a circle", "red one"]
        turns = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)][: 1 + number % 3]
        return {"id": f"sample-{number}", "image": Image.fromarray(pixels.numpy()), "turns": turns}

    def batch(self, rows: list[Row]) -> Batch:
        encoder = self.encoder
        return encoder.collate([encoder.encode(row["id"], row["image"], turns_of(row)) for row in rows])

    def maker(
        self, uri: Path, identity: Identity | None = None, settings: Targets = SETTINGS, **other: Any
    ) -> ShardMaker:
        identity = identity or self.identity
        encoder = Encoder(self.processor, 64, identity.positions)
        given: dict[str, Any] = {"model": self.model, "encoder": encoder, "dataset": self.dataset, **other}
        return ShardMaker(**given, settings=settings, uri=str(uri), identity=identity)

    def store(self, uri: Path, reporter: Reporter | None = None, **other: Any) -> TargetStore:
        maker = self.maker(uri, **other)
        maker.make(range(maker.settings.shards))
        return join_shards(maker.uri, maker.settings.shards, maker.identity, reporter)

    @torch.no_grad()
    def exact(self, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """Targets by another way: one sample at a time, all logits, probabilities instead of their logarithms."""
        parts = []
        for row in rows:
            batch = self.batch([row])
            p = (self.model(**batch.inputs).logits[0][batch.kept[0]].double() / self.identity.temperature).softmax(-1)
            mass, ids = p.sort(descending=True)
            parts.append((ids[:, :TOP_K], mass[:, :TOP_K].log(), mass[:, TOP_K:].sum(-1).log()))
        ids, logprobs, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids, logprobs, tail


def as_dataset(rows: list[Row]) -> Any:
    """``rows`` as ``open_dataset`` gives them, with PNG files inside."""
    stored = []
    for row in rows:
        file = io.BytesIO()
        row["image"].save(file, format="PNG")
        stored.append({**row, "image": {"bytes": file.getvalue(), "path": None}})
    return datasets.Dataset.from_list(stored).cast_column("image", PlacedImage())


def made_up(ids: list[str], positions: int = 5, k: int = TOP_K, first_token: int = 0) -> list[SampleTargets]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for id in ids:
        logits = torch.randn(positions, 3 * k, generator=generator)
        tokens = logits.topk(k).indices
        samples.append(SampleTargets(id, tokens + first_token, *bucket_logprobs(logits, tokens)))
    return samples
