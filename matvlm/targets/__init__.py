"""The sparse teacher targets: computed once per data set, stored in shards, looked up by sample id while training.

A position keeps the teacher's top-k token ids, their log-probabilities and the log of all remaining mass as one tail
bucket (``topk_tail``): 130 bytes at k = 32 with ids below 65536. ``topk_sampled`` also keeps S tokens drawn from the
tail, each weighted with the S-th part of its mass, which makes the loss's gradient unbiased: 98 bytes at k = S = 16.
The temperature is applied before the split, because a tail cannot be given another one later; so it belongs to the
store's identity, like everything else that decides the content.

A store is a folder (local or ``s3://``): ``shard-I-of-N.safetensors`` with its checksum in ``shard-I-of-N.json``,
written in that order, and ``manifest.json`` once all shards are there. Data without its checksum file is not believed.
A sample that could not be loaded any more has no targets; its shard's JSON names it and says why.

Shapes: P positions of all samples asked for, V vocabulary, k kept tokens a position.
"""

from matvlm.targets.batches import batch_targets
from matvlm.targets.check import GradientError, GradientReport, check_gradients
from matvlm.targets.compute import ShardMaker, shard_rows
from matvlm.targets.identity import Identity, TargetError, content_settings
from matvlm.targets.job import TargetJob
from matvlm.targets.shards import SampleTargets, Shard, missing_shards, write_shard
from matvlm.targets.store import StoreManifest, TargetReader, join_shards, open_targets, read_manifest

__all__ = [
    "GradientError",
    "GradientReport",
    "Identity",
    "SampleTargets",
    "Shard",
    "ShardMaker",
    "StoreManifest",
    "TargetError",
    "TargetJob",
    "TargetReader",
    "batch_targets",
    "check_gradients",
    "content_settings",
    "join_shards",
    "missing_shards",
    "open_targets",
    "read_manifest",
    "shard_rows",
    "write_shard",
]
