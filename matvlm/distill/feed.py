"""The samples of an update, as one process's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from matvlm.config import Recipe
from matvlm.data import packing
from matvlm.data.encoding import Batch, Encoder, Sample
from matvlm.data.loading import Loaded, batches
from matvlm.distill.failures import DistillError
from matvlm.distill.schedule import order
from matvlm.world import World

Row = TypeVar("Row")
GROUP = 8
"""Samples, or rows of packed ones, that the teacher is given together where micro-batches are smaller."""


class Group(NamedTuple):
    """Some samples as one batch, and the same as micro-batches."""

    whole: Batch
    parts: list[Batch]


class Share(NamedTuple):
    """One process's part of an update: at least one group of micro-batches, of which the first ``counted`` count.

    What does not count is there because all processes must make the same number of backward passes.
    """

    groups: list[Group]
    counted: int
    bad: dict[str, str]
    """Samples that could not be loaded, and why."""


class Feed:
    """The shares of process ``world.rank``, update by update; together they are the samples that ``order`` names.

    A batch has ``micro_batch_size`` samples, or rows of packed ones. Which samples they are is the same for any
    number of workers.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Any,
        encoder: Encoder,
        world: World,
        pinned: bool = False,
        untaught: Mapping[str, str] | None = None,
    ):
        """``pinned``: in memory that a GPU can copy from while it computes; ``untaught``: samples that have no targets
        and so count as bad, with the reasons.
        """
        self.recipe, self.dataset, self.encoder, self.world, self.pinned = recipe, dataset, encoder, world, pinned
        self.untaught = untaught or {}

    def shares(self, first: int, last: int) -> Iterator[Share]:
        """Those of the updates ``first`` to ``last``, counted from 1.

        Raises:
            LoadError: as ``matvlm.data.loading.batches`` does.
            DistillError: this process has no usable sample yet, and the update has none at all.
        """
        settings = self.recipe.distill
        updates = range(first, last + 1)
        rows = (order(len(self.dataset), settings.batch_size, self.recipe.seed, update) for update in updates)
        spare: Group | None = None
        own = (everyone[self.world.rank :: self.world.size] for everyone in rows)
        for update, loaded in zip(updates, batches(self.dataset, self.encoder, own, settings.workers), strict=True):
            loaded = self._taught(loaded)
            made = list(self._groups(loaded.samples))
            spare = made[-1] if made else spare or self._borrowed(update)
            yield Share(made or [spare], len(made), loaded.bad)

    def share_of(self, dataset: Any) -> Share:
        """All of ``dataset``, of samples that are not trained on.

        Raises:
            LoadError, DistillError: as ``shares``.
        """
        own = range(len(dataset))[self.world.rank :: self.world.size]
        loaded = self._taught(next(batches(dataset, self.encoder, [own], workers=0)))
        made = list(self._groups(loaded.samples))
        return Share(made or [self._borrowed(update=1)], len(made), loaded.bad)

    def _borrowed(self, update: int) -> Group:
        """Something for a process that has had none yet: of the first sample of ``update`` that can be loaded."""
        bad: list[str] = []
        for row in order(len(self.dataset), self.recipe.distill.batch_size, self.recipe.seed, update):
            for loaded in map(self._taught, batches(self.dataset, self.encoder, [[row]], workers=0)):
                if loaded.samples:
                    return next(self._groups(loaded.samples))
                bad += loaded.bad.values()
        raise DistillError(f"no usable sample: {'; '.join(bad)}")

    def _taught(self, loaded: Loaded) -> Loaded:
        found = {sample.id: self.untaught[sample.id] for sample in loaded.samples if sample.id in self.untaught}
        return Loaded([sample for sample in loaded.samples if sample.id not in found], loaded.bad | found)

    def _groups(self, samples: list[Sample]) -> Iterator[Group]:
        if self.recipe.distill.packing:
            yield from self._cut(packing.pack(samples, self.recipe.data.max_length), self._packed)
        else:
            yield from self._cut(samples, self.encoder.collate)

    def _cut(self, rows: Sequence[Row], collate: Callable[[Sequence[Row]], Batch]) -> Iterator[Group]:
        size = self.recipe.distill.micro_batch_size
        alike = self.recipe.distill.deepspeed.zero_stage == 3  # its processes have to run the same modules in one order
        several = size if alike else size * max(1, GROUP // size)
        for first in range(0, len(rows), several):
            chosen = rows[first : first + several]
            parts = [self._ready(collate(chosen[start : start + size])) for start in range(0, len(chosen), size)]
            yield Group(parts[0] if len(parts) == 1 else self._ready(collate(chosen)), parts)

    def _packed(self, rows: Sequence[list[Sample]]) -> Batch:
        return packing.collate(rows, self.encoder)

    def _ready(self, batch: Batch) -> Batch:
        return batch.pinned() if self.pinned else batch
