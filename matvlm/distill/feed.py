"""The samples of an update, as one process's micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from matvlm.config import Recipe
from matvlm.data import packing
from matvlm.data.encoding import Batch, Encoder, Sample
from matvlm.data.loading import batches
from matvlm.distill.failures import DistillError
from matvlm.distill.schedule import order
from matvlm.distill.world import World


class Share(NamedTuple):
    """One process's part of an update: at least one micro-batch, of which the first ``counted`` count.

    What does not count is there because all processes must make the same number of backward passes.
    """

    batches: list[Batch]
    counted: int
    bad: dict[str, str]
    """Samples that could not be loaded, and why."""


class Feed:
    """The shares of process ``world.rank``, update by update; together they are the samples that ``order`` names.

    A batch has ``micro_batch_size`` samples, or rows of packed ones. Which samples they are is the same for any
    number of workers.
    """

    def __init__(self, recipe: Recipe, dataset: Any, encoder: Encoder, world: World, pinned: bool = False):
        """``pinned``: in memory that a GPU can copy from while it computes."""
        self.recipe, self.dataset, self.encoder, self.world, self.pinned = recipe, dataset, encoder, world, pinned

    def shares(self, first: int, last: int) -> Iterator[Share]:
        """Those of the updates ``first`` to ``last``, counted from 1.

        Raises:
            LoadError: as ``matvlm.data.loading.batches`` does.
            DistillError: the first samples of the run are all unusable.
        """
        settings = self.recipe.distill
        updates = range(first, last + 1)
        rows = (order(len(self.dataset), settings.batch_size, self.recipe.seed, update) for update in updates)
        spare: Batch | None = None
        own = (everyone[self.world.rank :: self.world.size] for everyone in rows)
        for loaded in batches(self.dataset, self.encoder, own, settings.workers):
            made = list(self._micro_batches(loaded.samples))
            spare = made[-1] if made else spare
            if spare is None:
                raise DistillError(f"no usable sample: {'; '.join(loaded.bad.values())}")
            yield Share(made or [spare], len(made), loaded.bad)

    def _micro_batches(self, samples: list[Sample]) -> Iterator[Batch]:
        size = self.recipe.distill.micro_batch_size
        if self.recipe.distill.packing:
            rows = packing.pack(samples, self.recipe.data.max_length)
            made = (packing.collate(rows[start : start + size], self.encoder) for start in range(0, len(rows), size))
        else:
            made = (self.encoder.collate(samples[start : start + size]) for start in range(0, len(samples), size))
        for batch in made:
            yield batch.pinned() if self.pinned else batch
