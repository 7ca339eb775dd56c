"""Objects that a cluster takes, and ways to spoil them."""

from __future__ import annotations

import copy
import time
from typing import Any

from kube.launch import IMAGE


def job(script: str, *, spec: dict[str, Any] | None = None, pod: dict[str, Any] | None = None, **fields: Any) -> Any:
    """One that runs a shell script; the rest goes into its specification, its pod's and its container."""
    container = {"name": "main", "image": IMAGE, "command": ["bash", "-c", script], **fields}
    template = {"spec": {"restartPolicy": "Never", "containers": [container], **(pod or {})}}
    spec = {"backoffLimit": 0, "template": template, **(spec or {})}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "t-"}, "spec": spec}


def jobset(**scripts: str) -> Any:
    """With a Job for each script."""
    parts = [{"name": name, "replicas": 1, "template": {"spec": job(text)["spec"]}} for name, text in scripts.items()]
    spec = {"replicatedJobs": parts, "startupPolicy": {"startupPolicyOrder": "InOrder"}, "network": None}
    kind = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return {**kind, "metadata": {"name": f"js-{time.monotonic_ns() % 10**9}"}, "spec": spec}


def broken(path: str, value: Any, made: Any) -> Any:
    """``made`` with another value at a dotted path."""
    made = copy.deepcopy(made)
    place, keys = made, path.split(".")
    for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
    place[keys[-1]] = value
    return made
