"""Running the teacher over the data to fill a target store, several shards in one stream of batches.

Nothing waits that could go on: workers read ahead, over the borders of shards too; a batch's targets are fetched when
the next one has been launched; and a shard is written while the next one is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from matvlm.config import Targets
from matvlm.data.encoding import Encoder
from matvlm.data.loading import batches
from matvlm.phases import Phases
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.targets.batches import Underway, launch
from matvlm.targets.identity import Identity, TargetError
from matvlm.targets.shards import SampleTargets, Shard, compacted, finished_shard, shard_name, write_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHOWN_SAMPLES = 4
"""Of those that cannot be loaded, in the error that they are too many."""


def shard_rows(num_rows: int, num_shards: int, shard_index: int) -> range:
    """The rows of the data set that belong to a shard: every ``num_shards``-th, starting at ``shard_index``."""
    return range(shard_index, num_rows, num_shards)


Computed = tuple[list[SampleTargets], dict[str, str]]
"""Of one row list: its samples' targets, and the samples that cannot be loaded, with the reasons."""


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of the store at ``uri`` by running the teacher over the rows of the data set that belong to them."""

    model: PreTrainedModel
    encoder: Encoder
    dataset: Any
    """The whole data set, of ``open_dataset``."""
    settings: Targets
    """How it is done; what is kept, ``identity`` decides."""
    uri: str
    identity: Identity
    max_bad_share: float = 0.0
    """Of a shard's samples, how many may be left out because they cannot be loaded."""

    def make(self, indices: Sequence[int], reporter: Reporter | None = None) -> list[Shard]:
        """Write the shards ``indices``, of ``settings.shards``.

        A complete shard of the same identity is verified and kept untouched, so a killed run continues where it was. A
        sample that cannot be loaded is logged, and its shard says that it is left out, and why. Reports in which shares
        of its time the device waited for data, ran the teacher, made targets of its logits, and waited for files.

        Raises:
            TargetError: the place holds a shard of another identity, too many samples cannot be loaded, or memory ran
                out.
            LoadError: as ``matvlm.data.loading.batches`` does.
            StorageError: a shard could not be written; nothing is left in its place, and finished ones stay.
        """
        shards = self.settings.shards
        found = {index: finished_shard(self.uri, shard_name(index, shards), self.identity) for index in indices}
        parts = [_part(self.dataset, self.settings, index) for index, shard in found.items() if shard is None]
        if parts:
            device = self.model.device
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self._memory_explained():
                phases = Phases(str(device))
                found |= self._write(parts, self._compute(parts, phases), reporter)
                phases.mark("write")
                spent = phases.spent()
            shares = {f"targets/share_{phase}": seconds / sum(spent.values()) for phase, seconds in spent.items()}
            (reporter or Reporter()).metrics(shares)
        return [shard for shard in found.values() if shard is not None]

    def _compute(self, parts: Sequence[_Part], phases: Phases) -> Iterator[Computed]:
        """What becomes of each row list of ``parts``, in their order."""
        row_lists = [rows for part in parts for rows in part.row_lists]
        before: tuple[Underway | None, dict[str, str]] | None = None
        for loaded in batches(self.dataset, self.encoder, row_lists, self.settings.workers):
            phases.mark("data")
            batch = self.encoder.collate(loaded.samples) if loaded.samples else None
            launched = launch(self.model, batch, self.identity, phases) if batch else None
            if before:
                yield _fetched(*before)
            before = launched, loaded.bad
        if before:
            yield _fetched(*before)

    def _write(
        self, parts: Sequence[_Part], computed: Iterator[Computed], reporter: Reporter | None
    ) -> dict[int, Shard]:
        """The shards of ``parts`` by number, each written while the next one is ``computed``."""
        label, total = "teacher_targets", sum(len(part.place) for part in parts)
        if len(parts) == 1:
            label += f" {parts[0].shard + 1}/{self.settings.shards}"
        written: list[Future[Shard]] = []
        with ThreadPoolExecutor(1, "shard") as writer, Progress(total, label, "sample", reporter) as progress:
            for part in parts:
                samples: list[SampleTargets] = []
                bad: dict[str, str] = {}
                for targets, lost in islice(computed, len(part.row_lists)):
                    samples += [compacted(sample, self.uri) for sample in targets]
                    bad |= lost
                    self._refuse(bad, lost, part)
                    progress.update(len(targets) + len(lost))
                    if written and written[-1].done():
                        written[-1].result()  # at once, if it went wrong
                if written:
                    written[-1].result()  # so two shards are held at most
                samples.sort(key=lambda sample: part.place[sample.id])
                arguments = (self.uri, part.shard, self.settings.shards, samples, self.identity, bad)
                written.append(writer.submit(write_shard, *arguments))
            return {part.shard: each.result() for part, each in zip(parts, written, strict=True)}

    def _refuse(self, bad: Mapping[str, str], lost: Mapping[str, str], part: _Part) -> None:
        for why in lost.values():
            log.warning("%s lacks a sample: %s", shard_name(part.shard, self.settings.shards), why)
        most = int(self.max_bad_share * len(part.place))
        if len(bad) > most:
            raise TargetError(
                f"{self.uri}: {shard_name(part.shard, self.settings.shards)}: {len(bad)} of {len(part.place)} samples "
                f"cannot be loaded any more, and data.max_bad_share allows {most}: "
                f"{'; '.join([*bad.values()][-SHOWN_SAMPLES:])}. Put the files back and run teacher_targets again, or "
                "prepare the data anew"
            )

    @contextmanager
    def _memory_explained(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TargetError(
                f"{self.uri}: out of memory on {self.model.device} while computing targets: lower targets.batch_size "
                f"({self.settings.batch_size}) or data.max_length ({self.identity.max_length})"
            ) from error


class _Part(NamedTuple):
    """What shard ``shard`` is made of."""

    shard: int
    row_lists: list[list[int]]
    """Its rows of the data set in batches of samples of about one length, so that little is padding."""
    place: dict[str, int]
    """Sample id -> its place in the shard, which is that in the data set."""


def _part(dataset: Any, settings: Targets, index: int) -> _Part:
    """Batches go from long to short, so that memory which is too small is too small at once."""
    rows = shard_rows(len(dataset), settings.shards, index)
    chosen = dataset.select(rows)
    lengths = [sum(len(turn["question"] + turn["answer"]) for turn in turns) for turns in chosen["turns"][:]]
    order = sorted(range(len(rows)), key=lambda number: -lengths[number])
    size = settings.batch_size
    row_lists = [[rows[number] for number in order[start : start + size]] for start in range(0, len(rows), size)]
    return _Part(index, row_lists, {id: place for place, id in enumerate(chosen["id"][:])})


def _fetched(launched: Underway | None, bad: dict[str, str]) -> Computed:
    return launched.fetch() if launched else [], bad
