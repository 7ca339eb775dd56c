"""The teacher's targets of one batch: launched on its device, and fetched from there when they are wanted.

Shapes: P kept positions of a batch, V vocabulary, k kept tokens a position, S draws a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from matvlm.data.encoding import Batch
from matvlm.losses import bucket_logprobs
from matvlm.models.families import BIDIRECTIONAL
from matvlm.models.packing import unpacked
from matvlm.phases import Phases
from matvlm.targets.identity import Identity
from matvlm.targets.sampling import draw_tail, uniforms
from matvlm.targets.shards import SampleTargets
from matvlm.teacher import head, kept_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024
"""Positions whose logits exist together: of V = 51,200 some 0.2 GB in float32, and a few times that while they are
sorted out."""


class Underway(NamedTuple):
    """Targets on their way from the device to this machine's memory."""

    ids: list[str]
    counts: list[int]
    values: list[Tensor]
    there: torch.cuda.Event | None
    """Says when they have arrived; None if they are there."""

    def fetch(self) -> list[SampleTargets]:
        """One entry a sample, in the order of the batch; waits until they have arrived."""
        if self.there is not None:
            self.there.synchronize()
        parts = (value.split(self.counts) for value in self.values)
        return [SampleTargets(*sample) for sample in zip(self.ids, *parts, strict=True)]


def batch_targets(model: PreTrainedModel, batch: Batch, identity: Identity) -> list[SampleTargets]:
    """The teacher's targets at the kept positions of each sample of ``batch``, on the CPU; k = min(top_k, V).

    ``identity`` decides temperature and scheme. Draws depend on its seed, the sample's id and the logits alone, so
    neither batch nor shard changes them.
    """
    return launch(model, batch, identity).fetch()


@torch.no_grad()
def launch(model: PreTrainedModel, batch: Batch, identity: Identity, phases: Phases | None = None) -> Underway:
    """``batch_targets`` that are not waited for: on a GPU the next batch can be launched before they are fetched."""
    counts = batch.kept.sum(1).tolist()
    uniform = _uniforms(batch.ids, counts, identity)
    on_gpu = model.device.type == "cuda"
    if model.config.model_type not in BIDIRECTIONAL:
        batch = batch.unmasked()
    with unpacked():
        hidden = kept_hidden(model, (batch.pinned() if on_gpu else batch).to(model.device))
    if uniform is not None:
        uniform = (uniform.pin_memory() if on_gpu else uniform).to(model.device, non_blocking=True)
    if phases:
        phases.mark("teacher")
    chunks = [
        _targets(model, hidden[start : start + CHUNK], None if uniform is None else uniform[start:], identity)
        for start in range(0, max(len(hidden), 1), CHUNK)  # also no position at all has its shapes
    ]
    values = [torch.cat(pieces).to("cpu", non_blocking=True) for pieces in zip(*chunks, strict=True)]
    there = torch.cuda.current_stream(model.device).record_event(torch.cuda.Event(blocking=True)) if on_gpu else None
    if phases:
        phases.mark("top_k")
    return Underway(batch.ids, counts, values, there)


def _targets(model: PreTrainedModel, hidden: Tensor, uniform: Tensor | None, identity: Identity) -> list[Tensor]:
    """Token ids [P, k], log-probabilities [P, k], tail [P] and maybe draws [P, S], at the last hidden states [P, H]."""
    logits = head(model, hidden).float() / identity.temperature
    token_ids = logits.topk(min(identity.top_k, logits.shape[-1])).indices
    values = [token_ids, *bucket_logprobs(logits, token_ids)]
    return values if uniform is None else [*values, draw_tail(logits, token_ids, uniform[: len(hidden)])]


def _uniforms(ids: Sequence[str], counts: Sequence[int], identity: Identity) -> Tensor | None:
    """float64 [P, S], of a scheme with draws."""
    if identity.samples is None or identity.seed is None:
        return None
    return torch.cat([uniforms(*each, identity.samples, identity.seed) for each in zip(ids, counts, strict=True)])
