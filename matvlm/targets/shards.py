"""One shard of a target store: written whole or not at all, believed only with a matching checksum."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from matvlm.artifacts import Artifact
from matvlm.storage import exists, join, local_copy, read_json, sha256_file, write_bytes, write_json
from matvlm.targets.identity import Identity, TargetError, refuse_other

log = logging.getLogger(__name__)

AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


class SampleTargets(NamedTuple):
    """One sample's targets: ``token_ids`` int64 [p, k], ``logprobs`` float32 [p, k], ``tail`` float32 [p].

    ``sampled_ids`` int64 [p, S] are draws from the tail, for the scheme that has them.
    """

    id: str
    token_ids: Tensor
    logprobs: Tensor
    tail: Tensor
    sampled_ids: Tensor | None = None


class Shard(Artifact):
    """One finished shard file and its checksum."""

    file: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_positions: int
    unusable: dict[str, str] = Field(default_factory=dict)
    """Samples that have no targets here because they could not be loaded: id -> why."""


class ShardRecord(Artifact):
    """Content of a shard's JSON file."""

    identity: Identity
    shard: Shard


def write_shard(
    uri: str,
    shard_index: int,
    num_shards: int,
    samples: Iterable[SampleTargets],
    identity: Identity,
    unusable: Mapping[str, str] | None = None,
) -> Shard:
    """Write one shard file and then its checksum file, each atomically.

    Log-probabilities become float16, token ids uint16 where all are below 65536 and int32 otherwise. ``unusable``
    samples are those of the shard's rows that are missing from ``samples``.

    Raises:
        TargetError: a sample id occurs twice, or a sample's targets are not numbers.
        StorageError: it could not be written; nothing is left in its place.
    """
    compact = [compacted(sample, uri) for sample in samples]
    ids = [sample.id for sample in compact]
    refuse_duplicates(ids, uri)
    token_ids = _concatenate([sample.token_ids for sample in compact], torch.int32)
    drawn = [sample.sampled_ids for sample in compact if sample.sampled_ids is not None]
    tensors = {
        "ids": torch.frombuffer(bytearray(json.dumps(ids).encode()), dtype=torch.uint8),
        "offsets": torch.tensor([0, *(len(sample.tail) for sample in compact)]).cumsum(0),
        "token_ids": _narrow(token_ids),
        "logprobs": _concatenate([sample.logprobs for sample in compact], torch.float16),
        "tail": _concatenate([sample.tail for sample in compact], torch.float16),
    }
    if drawn:
        tensors["sampled_ids"] = _narrow(torch.cat(drawn))
    content = save(tensors)
    name = shard_name(shard_index, num_shards)
    shard = Shard(
        file=f"{name}.safetensors",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        num_samples=len(ids),
        num_positions=len(token_ids),
        unusable=dict(unusable or {}),
    )
    write_bytes(join(uri, shard.file), content)
    record = ShardRecord(identity=identity, shard=shard)
    write_json(join(uri, f"{name}.json"), record.model_dump(mode="json"))
    return shard


def finished_shard(uri: str, name: str, identity: Identity) -> Shard | None:
    """The shard if it is whole and of ``identity``; None if it has to be (re)computed."""
    if not exists(join(uri, f"{name}.json")):
        return None
    shard = believed_record(uri, name, identity)
    try:
        open_shard(uri, shard)
    except TargetError as error:
        log.warning("%s; computing it again", error)
        return None
    return shard


def believed_record(uri: str, name: str, identity: Identity) -> Shard:
    """What a shard's checksum file says, its identity checked; the shard file itself is not looked at.

    Raises:
        TargetError: the checksum file is missing, unreadable or of another identity.
    """
    if not exists(join(uri, f"{name}.json")):
        raise TargetError(f"{uri}: {name} is not finished: its checksum file is missing; run teacher_targets again")
    record = read_checked(join(uri, f"{name}.json"), ShardRecord)
    refuse_other(record.identity, identity, join(uri, record.shard.file))
    return record.shard


def open_shard(uri: str, shard: Shard) -> dict[str, Tensor]:
    """The tensors of a shard, memory-mapped, after checking its sha256.

    Raises:
        TargetError: the file is missing or damaged.
    """
    where = join(uri, shard.file)
    if not exists(where):
        raise TargetError(f"{where}: the shard is missing; run teacher_targets again")
    path = local_copy(where)
    if sha256_file(path) != shard.sha256:
        raise TargetError(f"{where}: the shard is damaged (wrong sha256); run teacher_targets again")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(file.keys())}


def missing_shards(uri: str, num_shards: int) -> list[int]:
    """The shards of the store at ``uri`` that are not finished; nothing is verified."""
    names = [shard_name(index, num_shards) for index in range(num_shards)]
    return [index for index, name in enumerate(names) if not exists(join(uri, f"{name}.json"))]


def shard_name(index: int, num_shards: int) -> str:
    return f"shard-{index:05d}-of-{num_shards:05d}"


def read_checked(uri: str, kind: type[AnyArtifact]) -> AnyArtifact:
    """A JSON file as a ``kind``, or a ``TargetError`` that names the file."""
    try:
        return kind.model_validate(read_json(uri))
    except ValidationError as error:
        raise TargetError(f"{uri}: not a {kind.__name__} of this version of matvlm: {error}") from None


def compacted(sample: SampleTargets, uri: str) -> SampleTargets:
    """``sample`` in the types of a shard (ids still int32).

    Raises:
        TargetError: its targets are not numbers.
    """
    if sample.logprobs.isnan().any() or sample.tail.isnan().any():
        raise TargetError(
            f"{uri}: the teacher's output for sample {sample.id!r} is not a number; try teacher.dtype=float32"
        )
    drawn = None if sample.sampled_ids is None else sample.sampled_ids.int()
    return SampleTargets(sample.id, sample.token_ids.int(), sample.logprobs.half(), sample.tail.half(), drawn)


def refuse_duplicates(ids: list[str], uri: str) -> None:
    """Raise a ``TargetError`` that names a sample id which occurs twice."""
    if len(set(ids)) < len(ids):
        twice = next(id for id, count in Counter(ids).items() if count > 1)
        raise TargetError(f"{uri}: sample id {twice!r} occurs twice; ids must be unique in the data set")


def _narrow(token_ids: Tensor) -> Tensor:
    return token_ids if (token_ids >= 2**16).any() else token_ids.to(torch.uint16)


def _concatenate(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Also of no parts at all, for a shard without samples."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
