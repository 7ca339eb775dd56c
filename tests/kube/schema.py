"""What an API server holds against an object before it takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import kubernetes_validate

Object = dict[str, Any]

VERSIONS = ("1.31", "1.37")
"""Of Kubernetes, the oldest and the newest whose schemas a Job is held to."""
DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
FIELDS = (
    r"metadata\.(name|namespace|uid|(labels|annotations)\['[^']+'\])"
    r"|spec\.(nodeName|serviceAccountName)|status\.(hostIP|podIP)"
)
JOBSET_FIELDS = {
    *("replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy"),
    *("suspend", "coordinator", "managedBy", "ttlSecondsAfterFinished"),
}
SUFFIXES = {"": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}


class InvalidError(ValueError):
    """The object breaks a rule; the message names the field and the rule."""


def check(made: Object) -> None:
    """Hold a Job or JobSet to its schema, and to the rules that schemas cannot say.

    Raises:
        InvalidError: with everything that was found.
    """
    found = [*(_jobset(made) if made.get("kind") == "JobSet" else _job(made))]
    if found:
        raise InvalidError("; ".join(found))


def quantity(text: str) -> Decimal:
    """Kubernetes' number with a suffix: "1500m" -> 1.5, "4096M" -> 4096000000, "2Gi" -> 2147483648."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([numkMGTPE]?|[KMGTPE]i|[eE][-+]?\d+)", text)
    if not found:
        raise InvalidError(f"{text!r} is not a quantity")
    number, suffix = Decimal(found[1]), found[2]
    if suffix in BINARY:
        return number * 2 ** BINARY[suffix]
    return number.scaleb(SUFFIXES[suffix] if suffix in SUFFIXES else int(suffix[1:]))


def without_nulls(value: Any) -> Any:
    """What is null was not said."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def merged(made: Any, change: Any) -> Any:
    """JSON merge patch."""
    if not isinstance(change, dict):
        return change
    result = dict(made) if isinstance(made, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def _job(job: Object) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(job, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{version}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
            return
    yield from _metadata(job["metadata"], "metadata")
    template = job["spec"]["template"]
    yield from _metadata(template.get("metadata", {}), "spec.template.metadata")
    if template["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.template.spec.restartPolicy: a Job takes Never and OnFailure"
    names = {volume["name"] for volume in template["spec"].get("volumes", [])}
    for number, container in enumerate(template["spec"]["containers"]):
        yield from _container(container, names, f"spec.template.spec.containers[{number}]")


def _metadata(metadata: Object, where: str) -> Iterator[str]:
    name = metadata.get("name", metadata.get("generateName", "x").rstrip("-"))
    if not re.fullmatch(rf"{DNS_LABEL}(\.{DNS_LABEL})*", name) or len(name) > 63:
        yield f"{where}.name: {name!r} is not a name of at most 63 small letters, digits and hyphens"
    for kind in ("labels", "annotations"):
        for key, value in metadata.get(kind, {}).items():
            if not re.fullmatch(r"([\w.-]{1,253}/)?\w([\w.-]{0,61}\w)?", key):
                yield f"{where}.{kind}: {key!r} is not a key"
            if not isinstance(value, str):
                yield f"{where}.{kind}.{key}: {value!r} is not a string"
            elif kind == "labels" and not re.fullmatch(r"(\w([\w.-]{0,61}\w)?)?", value):
                yield f"{where}.labels.{key}: {value!r} is not a label's value"


def _container(container: Object, volumes: set[str], where: str) -> Iterator[str]:
    if not re.fullmatch(DNS_LABEL, container["name"]) or len(container["name"]) > 63:
        yield f"{where}.name: {container['name']!r} is not a name of small letters, digits and hyphens"
    if not container.get("image"):
        yield f"{where}.image: has to be named"
    for variable in container.get("env", []):
        source = variable.get("valueFrom", {})
        if "fieldRef" in source and not re.fullmatch(FIELDS, source["fieldRef"]["fieldPath"]):
            yield f"{where}.env.{variable['name']}: no such field: {source['fieldRef']['fieldPath']}"
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            yield f"{where}.volumeMounts: no volume is named {mount['name']}"
    yield from _resources(container.get("resources", {}), f"{where}.resources")


def _resources(resources: Object, where: str) -> Iterator[str]:
    try:
        asked, limits = (
            {name: quantity(str(amount)) for name, amount in resources.get(kind, {}).items()}
            for kind in ("requests", "limits")
        )
    except InvalidError as error:
        yield f"{where}: {error}"
        return
    for name, amount in (asked | limits).items():
        extended = "/" in name
        if extended and amount % 1:
            yield f"{where}.{name}: {amount} is not a whole number"
        if extended and name in asked and asked[name] != limits.get(name):
            yield f"{where}.{name}: requests and limits have to be equal"
    for name in asked.keys() & limits.keys():
        if asked[name] > limits[name]:
            yield f"{where}.requests.{name}: {asked[name]} is more than the limit, {limits[name]}"


def _jobset(jobset: Object) -> Iterator[str]:
    spec = jobset.get("spec", {})
    if jobset.get("apiVersion") != "jobset.x-k8s.io/v1alpha2" or jobset.keys() - {"status"} != {
        *("apiVersion", "kind", "metadata", "spec")
    }:
        yield "not a JobSet of jobset.x-k8s.io/v1alpha2"
    yield from _metadata(jobset.get("metadata", {}), "metadata")
    if unknown := spec.keys() - JOBSET_FIELDS:
        yield f"spec: unknown {sorted(unknown)}"
    order = spec.get("startupPolicy", {}).get("startupPolicyOrder", "AnyOrder")
    if order not in ("AnyOrder", "InOrder"):
        yield f"spec.startupPolicy.startupPolicyOrder: {order!r} is neither AnyOrder nor InOrder"
    parts = spec.get("replicatedJobs", [])
    if not parts or len({part.get("name") for part in parts}) < len(parts):
        yield "spec.replicatedJobs: needs parts with different names"
    for part in parts:
        yield from (f"spec.replicatedJobs.{part.get('name')}: {text}" for text in _replicated(part, jobset))


def _replicated(part: Object, jobset: Object) -> Iterator[str]:
    if unknown := part.keys() - {"name", "template", "replicas", "groupName", "dependsOn"}:
        yield f"unknown {sorted(unknown)}"
    replicas = part.get("replicas", 1)
    if type(replicas) is not int or replicas < 0:
        yield f"replicas: {replicas!r} is not a number of Jobs"
        return
    for number in range(replicas):
        name = f"{jobset['metadata'].get('name')}-{part.get('name')}-{number}"
        metadata = part.get("template", {}).get("metadata", {}) | {"name": name}
        yield from _job(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": part["template"].get("spec")}
        )
