"""A target store in the making: whichever shards are missing, one or all, and their joining when they are there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from matvlm.artifacts import DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.data.encoding import Encoder
from matvlm.data.prepare import open_dataset
from matvlm.reporting import Reporter
from matvlm.storage import exists, join
from matvlm.targets.compute import compute_shard, shard_rows
from matvlm.targets.identity import Identity
from matvlm.targets.shards import Shard, shard_name
from matvlm.targets.store import join_shards
from matvlm.teacher import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TargetJob:
    """Makes the store at ``uri`` that ``recipe`` needs for ``data``; a job elsewhere may make other shards of it."""

    def __init__(self, recipe: Recipe, model: PreTrainedModel, processor: Any, data: DataManifest, uri: str):
        """``model`` is the teacher, on the device that computes.

        Raises:
            DataError: the prepared data is gone or damaged.
            ValueError: ``recipe.targets.positions`` cannot be told with ``processor``.
        """
        self.model, self.uri, self.settings = model, uri, recipe.targets
        self.encoder = Encoder(processor, recipe.data.max_length, recipe.targets.positions)
        self.dataset = open_dataset(data)
        self.identity = Identity.of(recipe, data, processor, fingerprint(model))
        self.computed_samples, self.seconds = 0, 0.0

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        names = [shard_name(index, self.settings.shards) for index in range(self.settings.shards)]
        return [index for index, name in enumerate(names) if not exists(join(self.uri, f"{name}.json"))]

    def compute(self, index: int, reporter: Reporter | None = None) -> Shard:
        """``compute_shard`` of the rows that belong to shard ``index``; reports how fast it was, writing included.

        Raises:
            TargetError, StorageError: as ``compute_shard`` does.
        """
        if not 0 <= index < self.settings.shards:
            raise ValueError(
                f"shard {index}: targets.shards={self.settings.shards} are 0 to {self.settings.shards - 1}"
            )
        rows = self.dataset.select(shard_rows(len(self.dataset), self.settings.shards, index))
        missing, started = index in self.missing(), time.monotonic()
        shard = compute_shard(self.model, self.encoder, rows, self.settings, self.uri, index, self.identity, reporter)
        if missing:
            seconds = time.monotonic() - started
            self.computed_samples, self.seconds = self.computed_samples + len(rows), self.seconds + seconds
            (reporter or Reporter()).metrics({"targets/samples_per_second": len(rows) / seconds})
        return shard

    def join(self, reporter: Reporter | None = None) -> TargetStore:
        """``join_shards`` of all shards."""
        return join_shards(self.uri, self.settings.shards, self.identity, reporter)
