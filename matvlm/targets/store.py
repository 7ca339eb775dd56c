"""A whole target store: joining its shards, and looking targets up by sample id while training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from matvlm.artifacts import Artifact, TargetStore
from matvlm.losses import sampled_kl, sparse_kl
from matvlm.reporting import Reporter
from matvlm.storage import exists, join, write_json
from matvlm.targets.identity import Identity, TargetError, refuse_other
from matvlm.targets.shards import (
    Shard,
    believed_record,
    open_shard,
    read_checked,
    refuse_duplicates,
    shard_name,
)

MANIFEST = "manifest.json"


class StoreManifest(Artifact):
    """Content of ``manifest.json``; kept mass is the probability of the top-k at a position."""

    format: Literal[1] = 1
    identity: Identity
    identity_sha256: str
    shards: list[Shard]
    num_samples: int
    num_positions: int
    bytes_per_position: float
    kept_mass_mean: float
    kept_mass_p1: float
    """1st percentile over the positions."""


def join_shards(uri: str, num_shards: int, identity: Identity, reporter: Reporter | None = None) -> TargetStore:
    """Verify all shards and write the manifest that makes them a store; reports its size and the mass it keeps.

    Raises:
        TargetError: a shard is missing, damaged, of another identity, or holds a sample of another shard.
    """
    shards = [believed_record(uri, shard_name(index, num_shards), identity) for index in range(num_shards)]
    reader = TargetReader(uri, shards)
    mass = reader.kept_mass()
    if not len(mass):
        raise TargetError(f"{uri}: no target position in any shard: no sample has an answer token")
    manifest = StoreManifest(
        identity=identity,
        identity_sha256=identity.sha256,
        shards=shards,
        num_samples=sum(shard.num_samples for shard in shards),
        num_positions=len(mass),
        bytes_per_position=sum(shard.num_bytes for shard in shards) / len(mass),
        kept_mass_mean=float(mass.mean()),
        kept_mass_p1=float(np.quantile(mass, 0.01)),
    )
    write_json(join(uri, MANIFEST), manifest.model_dump(mode="json"))
    numbers = ("num_samples", "num_positions", "bytes_per_position", "kept_mass_mean", "kept_mass_p1")
    metrics = {f"targets/{name}": float(getattr(manifest, name)) for name in numbers}
    (reporter or Reporter()).metrics(metrics | {"targets/num_unusable": float(len(reader.unusable))})
    return TargetStore(
        uri=uri,
        num_samples=manifest.num_samples,
        num_positions=manifest.num_positions,
        bytes_per_position=manifest.bytes_per_position,
        kept_mass_mean=manifest.kept_mass_mean,
        identity=manifest.identity_sha256,
    )


def read_manifest(uri: str) -> StoreManifest:
    """What the store at ``uri`` says of itself.

    Raises:
        TargetError: no finished store is there.
    """
    if not exists(join(uri, MANIFEST)):
        raise TargetError(f"{uri}: no finished target store: {MANIFEST} is missing; run teacher_targets first")
    return read_checked(join(uri, MANIFEST), StoreManifest)


def open_targets(uri: str, expected: Identity | None = None) -> TargetReader:
    """Open the store at ``uri``, every checksum verified once.

    Raises:
        TargetError: no finished store there, a damaged shard, or an identity other than ``expected``.
    """
    manifest = read_manifest(uri)
    if expected is not None:
        refuse_other(manifest.identity, expected, uri)
    return TargetReader(uri, manifest.shards)


class TargetReader:
    """Looks targets up by sample id. Shard files are memory-mapped, so only what is looked up takes memory."""

    def __init__(self, uri: str, shards: Sequence[Shard]):
        self.uri = uri
        self.unusable = {id: why for shard in shards for id, why in shard.unusable.items()}
        """The samples that the store leaves out, as they could not be loaded when it was made: id -> why."""
        self._shards = [open_shard(uri, shard) for shard in shards]
        self._sampled = any("sampled_ids" in tensors for tensors in self._shards)
        self._offsets = [tensors["offsets"].tolist() for tensors in self._shards]
        ids = [json.loads(tensors["ids"].numpy().tobytes()) for tensors in self._shards]
        refuse_duplicates([id for of_shard in ids for id in of_shard], uri)
        self._place = {id: (shard, row) for shard, of_shard in enumerate(ids) for row, id in enumerate(of_shard)}

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._place

    def count(self, sample_id: str) -> int:
        """Number of target positions of a sample.

        Raises:
            TargetError: the store has no such sample.
        """
        _, start, stop = self._find(sample_id)
        return stop - start

    def lookup(self, sample_ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """The targets of several samples, one after the other, each position's k + 1 buckets summing to one.

        Returns:
            ``token_ids`` int64 [P, k], ``logprobs`` float32 [P, k] and ``tail`` float32 [P]: what ``sparse_kl`` takes.

        Raises:
            TargetError: the store has no such sample.
        """
        token_ids = self._rows("token_ids", sample_ids, torch.int64)
        logprobs, tail = (self._rows(name, sample_ids, torch.float32) for name in ("logprobs", "tail"))
        total = torch.logaddexp(logprobs.logsumexp(-1), tail)
        return token_ids, logprobs - total[:, None], tail - total

    def draws(self, sample_ids: Sequence[str]) -> Tensor | None:
        """The tokens drawn from the tails of several samples, int64 [P, S]; None if the store's scheme draws none.

        Raises:
            TargetError: the store has no such sample.
        """
        return self._rows("sampled_ids", sample_ids, torch.int64) if self._sampled else None

    def kl(self, logits: Tensor, sample_ids: Sequence[str], temperature: float = 1.0) -> Tensor:
        """KL(teacher || student) of several samples, summed over positions, by the loss of the store's scheme.

        Args:
            logits: the student's [P, V] at the samples' kept positions, on any device.
            temperature: the store's own.

        Raises:
            TargetError: the store has no such sample.
            ValueError: ``logits`` are of other positions.
        """
        token_ids, logprobs, tail = (values.to(logits.device) for values in self.lookup(sample_ids))
        drawn = self.draws(sample_ids)
        if drawn is None:
            return sparse_kl(logits, token_ids, logprobs, tail, temperature)
        return sampled_kl(logits, token_ids, logprobs, drawn.to(logits.device), tail, temperature)

    def kept_mass(self) -> np.ndarray:
        """The probability of the top-k at every position of the store, float32."""
        return -np.expm1(np.concatenate([tensors["tail"].float().numpy() for tensors in self._shards]))

    def _rows(self, name: str, sample_ids: Sequence[str], dtype: torch.dtype) -> Tensor:
        places = [self._find(sample_id) for sample_id in sample_ids]
        return torch.cat([self._shards[shard][name][start:stop].to(dtype) for shard, start, stop in places])

    def _find(self, sample_id: str) -> tuple[int, int, int]:
        try:
            shard, row = self._place[sample_id]
        except KeyError:
            why = self.unusable.get(sample_id, "the store was made from other data")
            raise TargetError(f"{self.uri}: no targets for sample {sample_id!r}: {why}") from None
        return shard, self._offsets[shard][row], self._offsets[shard][row + 1]
