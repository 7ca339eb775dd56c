"""What somebody has who may start runs on a cluster: its settings, its store, and a look at its pods."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import s3_server
from flow_tools import FlowProcess, environment
from kubernetes import client, config

from kube import metadata
from kube.schema import Object
from kube.server import Api, serve

NAMESPACE = "matvlm-jobs"
SECRET = "matvlm-tasks"
IMAGE = "matvlm:cpu-0.1.0"


@dataclass
class Launcher:
    """
    Attributes:
        folder: where runs are started; its ``pods`` have folders of their own.
        store: URI of a bucket.
        variables: what is exported before a run is started.
    """

    api: Api
    folder: Path
    store: str
    variables: dict[str, str]

    def start(self, flow: Path, *words: str, log: str = "log.txt", **extra: str) -> FlowProcess:
        return FlowProcess(self.folder, *words, flow=str(flow), log=log, **self.variables, **extra)

    def artifacts(self, flow: str, *names: str) -> dict[str, Any]:
        """Of the flow's latest run, as its user reads them in another process."""
        code = f"import json, metaflow as m; d = m.Flow({flow!r}).latest_run.data; "
        code += f"print(json.dumps({{name: getattr(d, name) for name in {names!r}}}))"
        command, variables = [sys.executable, "-c", code], environment(**self.variables)
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def pods(self, step: str) -> list[Object]:
        """Those that there are now of a flow's step."""
        return [pod for pod in self.api.cluster.list("pods", NAMESPACE) if step_of(pod) == step]

    def keep_versions(self) -> None:
        """Let the store keep every object that is written over."""
        bucket = self.store.removeprefix("s3://")
        self._s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})

    def versions(self) -> Counter[str]:
        """How often each object in the store was written."""
        bucket, found = self.store.removeprefix("s3://"), Counter[str]()
        for page in self._s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            found.update(version["Key"] for version in page.get("Versions", []))
        return found

    @property
    def _s3(self) -> Any:
        return boto3.client("s3", endpoint_url=self.variables["METAFLOW_S3_ENDPOINT_URL"])

    def delete_running(self, step: str, at_most: int | None = None) -> list[str]:
        """Delete running pods of a step, as a node that goes away does; returns their names."""
        names = [pod["metadata"]["name"] for pod in self.pods(step) if pod["status"]["phase"] == "Running"][:at_most]
        for name in names:
            core(self.api).delete_namespaced_pod(name, NAMESPACE)
        return names


def step_of(made: Object) -> str:
    """The flow's step that a Job, JobSet or pod was made for."""
    return str(made["metadata"].get("annotations", {}).get("metaflow/step_name", ""))


def api_client(api: Api) -> Any:
    return config.new_client_from_config(str(api.kubeconfig))


def core(api: Api) -> Any:
    return client.CoreV1Api(api_client(api))


@contextmanager
def cluster(folder: Path, **secret: str) -> Iterator[Launcher]:
    """A cluster with an S3 store, as infra/README.md leaves it; ``secret`` is known to tasks and to who starts them."""
    place = folder / "cluster"
    place.mkdir()
    with (
        s3_server.serve() as endpoint,
        s3_server.empty_bucket(endpoint, folder / "cache") as store,
        metadata.serve() as service,
    ):
        known = s3_server.variables(endpoint, folder / "cache") | secret
        with serve(place, {SECRET: known}) as api:
            variables = {
                "KUBECONFIG": str(api.kubeconfig),
                "METAFLOW_DEFAULT_METADATA": "service",
                "METAFLOW_SERVICE_URL": service,
                "METAFLOW_DEFAULT_DATASTORE": "s3",
                "METAFLOW_DATASTORE_SYSROOT_S3": f"{store}/metaflow",
                "METAFLOW_S3_ENDPOINT_URL": endpoint,
                "METAFLOW_KUBERNETES_NAMESPACE": NAMESPACE,
                "METAFLOW_KUBERNETES_SERVICE_ACCOUNT": "tasks",
                "METAFLOW_KUBERNETES_SECRETS": SECRET,
                "METAFLOW_KUBERNETES_CONTAINER_IMAGE": IMAGE,
            }
            yield Launcher(api, folder, store, known | variables)
