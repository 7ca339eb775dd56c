"""What can go wrong in an update: a result that is no number, which a run survives a few times; too little memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import psutil
import torch

from matvlm.config import Recipe

log = logging.getLogger(__name__)

CPU_ALLOCATOR = "can't allocate memory"
"""What torch's CPU allocator says, in a plain RuntimeError."""
ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")
SHOWN_SAMPLES = 4
"""Of each skipped update, in the error that names all of them."""


class DistillError(RuntimeError):
    """Distillation cannot go on; the message says at which update, why, and what to change."""


class Skipped:
    """The updates of a run that were not made because their loss or gradient was not finite."""

    def __init__(self, most: int):
        """``most`` of them are allowed (``recipe.distill.max_skipped_updates``)."""
        self.most = most
        self.updates: dict[int, list[str]] = {}

    def add(self, update: int, total: int, what: str, ids: Sequence[str]) -> None:
        """Log and count ``update`` of ``total``.

        Args:
            what: which value is not finite, as words.
            ids: the samples that it came from.

        Raises:
            DistillError: there are more than ``most`` now, or no update of the run was made.
        """
        self.updates[update] = list(ids)
        count = len(self.updates)
        log.warning("update %d is skipped (%d so far): %s on samples %s", update, count, what, ", ".join(ids))
        if count <= self.most and count < total:
            return
        raise DistillError(
            f"{count} of {total} updates had to be skipped (distill.max_skipped_updates allows {self.most}): "
            f"{self._named()}; in the last one, {what}. Lower distill.optimizer.lr or "
            "distill.optimizer.clip_grad_norm, or look at these samples"
        )

    def _named(self) -> str:
        named = []
        for update, ids in self.updates.items():
            more = f" and {len(ids) - SHOWN_SAMPLES} more" if len(ids) > SHOWN_SAMPLES else ""
            named.append(f"update {update} on {', '.join(ids[:SHOWN_SAMPLES])}{more}")
        return "; ".join(named)


class Unusable:
    """The samples that are missing from updates because they could not be loaded any more."""

    def __init__(self, most: int):
        """``most`` of them are allowed: ``recipe.data.max_bad_share`` of the data."""
        self.most = most
        self.samples: dict[str, str] = {}

    def add(self, update: int, bad: Mapping[str, str]) -> None:
        """Log and count the ``bad`` samples of ``update``, each with the reason; the same one counts once.

        Raises:
            DistillError: there are more than ``most`` now.
        """
        for why in bad.values():
            log.warning("update %d lacks a sample: %s", update, why)
        self.samples |= bad
        if len(self.samples) > self.most:
            shown = "; ".join([*self.samples.values()][-SHOWN_SAMPLES:])
            raise DistillError(
                f"update {update}: {len(self.samples)} samples cannot be loaded any more, and data.max_bad_share "
                f"allows {self.most}: {shown}. Put the files back and resume, or prepare the data anew"
            )


@contextmanager
def memory_explained(recipe: Recipe, device: str, update: int) -> Iterator[None]:
    """Inside, running out of memory (of a GPU, or refused by torch's CPU allocator) is a ``DistillError``.

    Raises:
        DistillError: with what was asked for, what is in use and what to lower; the original error is its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        asked = ASKED.search(str(error))
        distill = recipe.distill
        lower = [f"data.max_length ({recipe.data.max_length})"]
        if distill.micro_batch_size > 1:
            lower.insert(0, f"distill.micro_batch_size ({distill.micro_batch_size}; the update stays the same)")
        keep = "keep less for the backward pass (distill.activation_checkpointing: mixers), "
        raise DistillError(
            f"update {update}: out of memory on {device}: {asked[1] if asked else 'more than there is'} asked for, "
            f"{memory_in_use(device) / 1e9:.1f} GB in use at most; lower {' or '.join(lower)}, "
            f"{keep if distill.activation_checkpointing == 'none' else ''}or share gradients and optimiser among more "
            "GPUs (distill.engine: deepspeed, distill.deepspeed.zero_stage: 2)"
        ) from error


def memory_in_use(device: str) -> int:
    """Bytes: the peak of the tensors on a GPU, or the process's resident memory now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    resident: int = psutil.Process().memory_info().rss
    return resident
