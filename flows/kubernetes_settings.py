"""Whether ``--with kubernetes`` can work with the settings that are here, asked before anything starts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

GUIDE = "infra/README.md leads from an empty cluster to a finished run."


def problem(words: Sequence[str]) -> str | None:
    """Of the command line ``words``: all that ``--with kubernetes`` lacks, and what to set; None if it is not asked for
    or lacks nothing.
    """
    wanted = [option for option in _options(words, "--with") if option.partition(":")[0] == "kubernetes"]
    if not wanted:
        return None
    missing = [*_no_store(words), *_no_image(wanted), *_no_cluster()]
    if not missing:
        return None
    return "\n  ".join(["--with kubernetes: this is not set up yet:", *missing]) + f"\n{GUIDE}"


def asked_for(words: Sequence[str]) -> bool:
    """Whether the command line ``words`` is of a run on a cluster, a task of one, or a deployment."""
    return any(word.partition(":")[0] in ("kubernetes", "argo-workflows", "--with=kubernetes") for word in words)


def _options(words: Sequence[str], name: str) -> list[str]:
    """The values of the option ``name``, given as two words or with an equals sign."""
    spaced = [value for word, value in itertools.pairwise(words) if word == name]
    return spaced + [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]


def _no_store(words: Sequence[str]) -> Iterator[str]:
    from metaflow import metaflow_config as settings

    kind = (_options(words, "--datastore") or [settings.DEFAULT_DATASTORE])[-1]
    if kind not in ("s3", "azure", "gs"):
        yield f"Metaflow's datastore is {kind}, which pods do not see: set METAFLOW_DEFAULT_DATASTORE=s3"
    if kind == "s3" or kind == "local":
        root = (_options(words, "--datastore-root") or [settings.DATASTORE_SYSROOT_S3])[-1]
        if not root:
            yield "no place in S3: set METAFLOW_DATASTORE_SYSROOT_S3=s3://BUCKET/metaflow"


def _no_image(wanted: Sequence[str]) -> Iterator[str]:
    from metaflow import metaflow_config as settings

    if not settings.KUBERNETES_CONTAINER_IMAGE and not any("image=" in option for option in wanted):
        yield "no container image: set METAFLOW_KUBERNETES_CONTAINER_IMAGE to one of those that infra/docker builds"


def _no_cluster() -> Iterator[str]:
    from kubernetes import config

    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return  # inside a cluster
    try:
        config.load_kube_config()
    except config.ConfigException as error:
        yield f"no cluster ({error}): set KUBECONFIG, or make `kubectl get pods` work"
