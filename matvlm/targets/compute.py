"""Running the teacher over the data to fill a target store, shard by shard.

Shapes: P kept positions of a batch, V vocabulary, k kept tokens a position, S draws a position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matvlm.config import Targets
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import encode_rows
from matvlm.losses import bucket_logprobs
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.targets.identity import Identity
from matvlm.targets.sampling import draw_tail, uniforms
from matvlm.targets.shards import SampleTargets, Shard, finished_shard, shard_name, write_shard
from matvlm.teacher import head, kept_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 1024
"""Positions whose logits exist together: of V = 51,200 some 0.2 GB in float32, and a few times that while they are
sorted out."""


def shard_rows(num_rows: int, num_shards: int, shard_index: int) -> range:
    """The rows of the data set that belong to a shard: every ``num_shards``-th, starting at ``shard_index``."""
    return range(shard_index, num_rows, num_shards)


def compute_shard(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[dict[str, Any]],
    settings: Targets,
    uri: str,
    shard_index: int,
    identity: Identity,
    reporter: Reporter | None = None,
) -> Shard:
    """Run the teacher over ``rows`` and write shard ``shard_index`` of ``settings.shards``.

    A complete shard of the same identity is verified and kept untouched, so a killed run continues where it was.

    Args:
        rows: the shard's part of the data set (``shard_rows``), mappings of ``id``, PIL ``image`` and ``turns``.
        identity: of the whole store; it decides what is kept, ``settings`` only how.

    Raises:
        TargetError: the place holds a shard of another identity.
        StorageError: the shard could not be written; nothing is left in its place.
    """
    name = shard_name(shard_index, settings.shards)
    finished = finished_shard(uri, name, identity)
    if finished:
        return finished

    def samples() -> Iterator[SampleTargets]:
        label = f"teacher_targets {shard_index + 1}/{settings.shards}"
        with Progress(len(rows), label, "sample", reporter) as progress:
            for start in range(0, len(rows), settings.batch_size):
                chunk = [rows[i] for i in range(start, min(start + settings.batch_size, len(rows)))]
                batch = encode_rows(encoder, chunk)
                yield from batch_targets(model, batch, identity)
                progress.update(len(chunk))

    return write_shard(uri, shard_index, settings.shards, samples(), identity)


@torch.inference_mode()
def batch_targets(model: PreTrainedModel, batch: Batch, identity: Identity) -> list[SampleTargets]:
    """The teacher's targets at the kept positions of each sample of ``batch``, on the CPU; k = min(top_k, V).

    ``identity`` decides temperature and scheme. Draws depend on its seed, the sample's id and the logits alone, so
    neither batch nor shard changes them.
    """
    hidden = kept_hidden(model, batch.to(model.device))
    counts = batch.kept.sum(1).tolist()
    uniform = _uniforms(batch.ids, counts, identity)
    chunks = []
    for start in range(0, max(len(hidden), 1), CHUNK):  # also no position at all has its shapes
        part = slice(start, start + CHUNK)
        logits = head(model, hidden[part]).float() / identity.temperature
        token_ids = logits.topk(min(identity.top_k, logits.shape[-1])).indices
        values = [token_ids, *bucket_logprobs(logits, token_ids)]
        if uniform is not None:
            values.append(draw_tail(logits, token_ids, uniform[part].to(logits.device)))
        chunks.append([value.cpu() for value in values])
    parts = (torch.cat(pieces).split(counts) for pieces in zip(*chunks, strict=True))
    return [SampleTargets(*sample) for sample in zip(batch.ids, *parts, strict=True)]


def _uniforms(ids: Sequence[str], counts: Sequence[int], identity: Identity) -> Tensor | None:
    if identity.samples is None or identity.seed is None:
        return None
    return torch.cat([uniforms(*each, identity.samples, identity.seed) for each in zip(ids, counts, strict=True)])
