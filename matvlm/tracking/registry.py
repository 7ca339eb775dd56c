"""Checkpoints by their registered name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matvlm.artifacts import Checkpoint
from matvlm.tracking.address import public_uri, tracking_uri
from matvlm.tracking.delivery import SYNC_SECONDS
from matvlm.tracking.store import CHECKPOINT_TAG, TrackingError, open_client, patience

SCHEME = "models:/"


class Version(NamedTuple):
    """A version of a registered model, and where its checkpoint is."""

    name: str
    number: str
    checkpoint_uri: str


def name_checkpoints(specs: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints, labelled by the last part of their names, or by the whole names where these are alike.

    Raises:
        TrackingError: as ``find_version`` does.
    """
    labels = [_label(spec) for spec in specs]
    labels = labels if len(set(labels)) == len(labels) else list(specs)
    return [Checkpoint(uri=resolve_checkpoint(spec), label=label) for spec, label in zip(specs, labels, strict=True)]


def _label(spec: str) -> str:
    return spec.removeprefix(SCHEME) if spec.startswith(SCHEME) else spec.rstrip("/").rpartition("/")[2]


def resolve_checkpoint(spec: str, uri: str | None = None) -> str:
    """The checkpoint URI behind ``models:/NAME/3`` or ``models:/NAME@ALIAS``; any other ``spec`` unchanged.

    Raises:
        TrackingError: as ``find_version`` does.
    """
    return find_version(spec, uri).checkpoint_uri if spec.startswith(SCHEME) else spec


def find_version(spec: str, uri: str | None = None) -> Version:
    """The version that ``models:/NAME/3`` or ``models:/NAME@ALIAS`` names.

    Raises:
        TrackingError: neither of the two forms, no such version or alias, or MLflow cannot be reached.
    """
    reference = spec.removeprefix(SCHEME)
    name, at, alias = reference.partition("@")
    if not at:
        name, _, version = reference.partition("/")
    if not spec.startswith(SCHEME) or not name or "/" in name or not (alias if at else version.isdigit()):
        raise TrackingError(
            f"{spec}: expected {SCHEME}NAME/VERSION or {SCHEME}NAME@ALIAS, for instance models:/matvlm/3"
        )
    target = tracking_uri(uri)
    try:
        with patience(SYNC_SECONDS):
            client = open_client(target)
            found = client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, version)
    except Exception as error:
        raise TrackingError(f"{spec}: not found in MLflow at {public_uri(target)}: {error}") from error
    return Version(name, str(found.version), str(found.tags.get(CHECKPOINT_TAG) or found.source))
