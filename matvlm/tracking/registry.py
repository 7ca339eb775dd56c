"""Checkpoints by their registered name."""

from __future__ import annotations

from matvlm.tracking.delivery import SYNC_SECONDS
from matvlm.tracking.store import CHECKPOINT_TAG, TrackingError, open_client, patience, public_uri, tracking_uri

SCHEME = "models:/"


def resolve_checkpoint(spec: str, uri: str | None = None) -> str:
    """The checkpoint URI behind ``models:/NAME/3`` or ``models:/NAME@ALIAS``; any other ``spec`` unchanged.

    Raises:
        TrackingError: neither of the two forms, no such version or alias, or MLflow cannot be reached.
    """
    if not spec.startswith(SCHEME):
        return spec
    reference = spec.removeprefix(SCHEME)
    name, at, alias = reference.partition("@")
    if not at:
        name, _, version = reference.partition("/")
    if not name or "/" in name or not (alias if at else version.isdigit()):
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
    return str(found.tags.get(CHECKPOINT_TAG) or found.source)
