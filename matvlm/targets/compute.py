"""Running the teacher over the data to fill a target store, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from matvlm.config import Targets
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import encode_rows
from matvlm.losses import bucket_logprobs
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.targets.identity import Identity
from matvlm.targets.shards import SampleTargets, Shard, finished_shard, shard_name, write_shard
from matvlm.teacher import kept_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        identity: of the whole store; its ``top_k`` and ``temperature`` decide what is kept.

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
                yield from batch_targets(model, batch, identity.top_k, identity.temperature)
                progress.update(len(chunk))

    return write_shard(uri, shard_index, settings.shards, samples(), identity)


@torch.inference_mode()
def batch_targets(model: PreTrainedModel, batch: Batch, top_k: int, temperature: float) -> list[SampleTargets]:
    """The teacher's targets at the kept positions of each sample of ``batch``, on the CPU; k = min(top_k, V)."""
    logits = kept_logits(model, batch.to(model.device)) / temperature
    token_ids = logits.topk(min(top_k, logits.shape[-1])).indices
    logprobs, tail = bucket_logprobs(logits, token_ids)
    counts = batch.kept.sum(1).tolist()
    parts = (values.cpu().split(counts) for values in (token_ids, logprobs, tail))
    return [SampleTargets(*sample) for sample in zip(batch.ids, *parts, strict=True)]
