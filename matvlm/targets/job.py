"""A target store in the making: whichever shards are missing, one or all, and their joining when they are there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from matvlm.artifacts import DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.data.encoding import Encoder
from matvlm.data.prepare import open_dataset
from matvlm.models.fusing import compile_, fuse_activations_
from matvlm.models.hybrid import decoder_layers
from matvlm.reporting import Reporter
from matvlm.targets.compute import ShardMaker, shard_rows
from matvlm.targets.identity import Identity
from matvlm.targets.shards import missing_shards
from matvlm.targets.store import join_shards
from matvlm.teacher import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Done(NamedTuple):
    """How many samples' targets were computed, and how long that took."""

    samples: int
    seconds: float


class TargetJob:
    """Makes the store at ``uri`` that ``recipe`` needs for ``data``; a job elsewhere may make other shards of it."""

    def __init__(self, recipe: Recipe, model: PreTrainedModel, processor: Any, data: DataManifest, uri: str):
        """``model`` is the teacher, on the device that computes; from now on it does so in fewer kernels.

        Raises:
            DataError: the prepared data is gone or damaged.
            ValueError: ``recipe.targets.positions`` cannot be told with ``processor``.
        """
        self.model, self.uri, self.settings = model, uri, recipe.targets
        self.encoder = Encoder(processor, recipe.data.max_length, recipe.targets.positions)
        self.dataset = open_dataset(data)
        self.identity = Identity.of(recipe, data, processor, fingerprint(model))
        self.maker = ShardMaker(
            model, self.encoder, self.dataset, self.settings, uri, self.identity, recipe.data.max_bad_share
        )
        fuse_activations_(model)
        if self.settings.compile:
            compile_(decoder_layers(model))

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        return missing_shards(self.uri, self.settings.shards)

    def compute(self, indices: Sequence[int], reporter: Reporter | None = None) -> Done:
        """The shards ``indices``, as ``ShardMaker.make`` does it; reports how fast it was, writing included.

        Raises:
            ValueError: there is no such shard.
            TargetError, LoadError, StorageError: as ``ShardMaker.make`` does.
        """
        for index in indices:
            if not 0 <= index < self.settings.shards:
                raise ValueError(
                    f"shard {index}: targets.shards={self.settings.shards} are 0 to {self.settings.shards - 1}"
                )
        missing, started = set(self.missing()), time.monotonic()
        self.maker.make(indices, reporter)
        rows = [shard_rows(len(self.dataset), self.settings.shards, index) for index in indices if index in missing]
        done = Done(sum(map(len, rows)), time.monotonic() - started)
        if done.samples:
            (reporter or Reporter()).metrics({"targets/samples_per_second": done.samples / done.seconds})
        return done

    def join(self, reporter: Reporter | None = None) -> TargetStore:
        """``join_shards`` of all shards."""
        return join_shards(self.uri, self.settings.shards, self.identity, reporter)
