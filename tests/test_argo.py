"""What a cluster gets: the evaluation flow as Argo would run it, and the event that starts it.

The flow is deployed to an API server on loopback that knows nothing, takes everything and keeps it; the event goes to
a webhook that does the same.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import s3_server
import yaml
from flow_tools import FLOWS, WITH_DEBUG, environment, run_flow
from hera.workflows.models import WorkflowTemplate
from kube.schema import quantity
from metaflow.plugins.catch_decorator import NUM_FALLBACK_RETRIES

from matvlm.storage import list_files, read_bytes

EVENT = "matvlm-checkpoint"
SENSOR = {
    "METAFLOW_ARGO_EVENTS_EVENT": "metaflow-event",
    "METAFLOW_ARGO_EVENTS_EVENT_SOURCE": "metaflow-webhook",
    "METAFLOW_ARGO_EVENTS_SERVICE_ACCOUNT": "metaflow-events",
    "METAFLOW_KUBERNETES_NAMESPACE": "jobs",
    "METAFLOW_KUBERNETES_CONTAINER_IMAGE": "matvlm:gpu",
}


@contextmanager
def listening() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of a server, and what is posted to it; it says that nothing it is asked for is there."""
    posted: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(404, b'{"kind": "Status", "code": 404}')

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append(json.loads(body))
            self._answer(201, body)

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def kubeconfig(url: str, path: Path) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "loopback",
        "clusters": [{"name": "loopback", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "nobody"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def deployed(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``argo-workflows create`` makes on the cluster, by kind, and the ``files`` that go with it."""
    folder = tmp_path_factory.mktemp("argo")
    with s3_server.empty_bucket(s3_endpoint, folder) as bucket, listening() as (url, posted):
        variables = s3_server.variables(s3_endpoint, folder) | {
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{bucket}/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": s3_endpoint,
            "KUBECONFIG": str(kubeconfig(url, folder / "kubeconfig")),
        }
        words = (*WITH_DEBUG, "argo-workflows", "create")
        code, output = run_flow(folder, *words, flow="eval_flow.py", **variables, **SENSOR)
        assert code == 0, output
        package = f"{bucket}/metaflow/EvalFlow/data"
        (name,) = list_files(package)
        code_package = io.BytesIO(read_bytes(f"{package}/{name}"))
    assert "triggers automatically when the upstream" in output
    with tarfile.open(fileobj=code_package) as packed:
        files = {member.name: packed.extractfile(member) for member in packed if member.isfile()}
        texts = {name: file.read().decode(errors="replace") for name, file in files.items() if file}
    return {made["kind"]: made for made in posted} | {"files": texts}


def test_the_flow_is_a_workflow_with_its_recipe(deployed: dict[str, Any]) -> None:
    template = deployed["WorkflowTemplate"]["spec"]
    steps = {made["name"]: made for made in template["templates"]}
    names = [task["name"] for task in steps["EvalFlow"]["dag"]["tasks"]]
    assert names == ["start", "start-foreach-parts", "compare", "profile", "gate", "end"]
    assert [task["name"] for task in steps["start-foreach-parts"]["dag"]["tasks"]] == ["evaluate"]
    container = steps["evaluate"]["container"]
    assert container["image"] == "matvlm:gpu"
    assert "eval_flow.py" in container["command"][-1]
    (config,) = [text for text in deployed["files"].values() if "six updates through every stage" in text]
    assert '"limit": 40' in config
    assert deployed["files"].keys() >= {".mf_code/matvlm/gate.py", "evaluation.py", "eval_flow.py"}
    assert template["arguments"]["parameters"][0]["name"] == "checkpoint"


def test_the_event_of_a_checkpoint_starts_it_with_that_checkpoint(deployed: dict[str, Any]) -> None:
    sensor = deployed["Sensor"]["spec"]
    (dependency,) = sensor["dependencies"]
    assert (dependency["eventName"], dependency["eventSourceName"]) == ("metaflow-event", "metaflow-webhook")
    assert dependency["filters"]["exprs"][0] == {
        "expr": f"name == '{EVENT}'",
        "fields": [{"name": "name", "path": "body.payload.name"}],
    }
    (trigger,) = sensor["triggers"]
    made = trigger["template"]["k8s"]
    assert made["source"]["resource"]["spec"]["workflowTemplateRef"]["name"] == "evalflow"
    given = {parameter["dest"]: parameter["src"] for parameter in made["parameters"]}
    source = given["spec.arguments.parameters.#(name=checkpoint).value"]
    assert source["dependencyName"] == dependency["name"]
    assert '(get $.Input.body.payload "checkpoint" | toRawJson)' in source["dataTemplate"]


GPU = "matvlm:gpu-0.1.0"
RESOURCES = {
    "gpu": 2,
    "cpu": 3,
    "memory_mb": 9000,
    "retries": 3,
    "retry_minutes": 4,
    "timeout_hours": 1.5,
    "image": GPU,
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "steps": {"evaluate": {"gpu": 1, "retries": 1}, "prepare_data": {"memory_mb": 5000}},
}
COMPUTING = {
    "train": {"teacher-targets", "init-hybrid", "distill", "evaluate", "profile"},
    "eval": {"evaluate", "profile"},
    "profile": {"profile"},
    "teacher": {"train", "evaluate"},
    "sweep": {"teacher-targets", "point", "profile"},
}
"""Steps of each flow that ask for what the recipe says of all, as Argo names them."""
CAUGHT = (("eval", "evaluate"), ("sweep", "point"))
"""Steps whose failure the flow survives."""


@pytest.fixture(scope="module")
def store(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Settings that lead a deployment to a bucket."""
    folder = tmp_path_factory.mktemp("store")
    with s3_server.empty_bucket(s3_endpoint, folder) as bucket:
        yield s3_server.variables(s3_endpoint, folder) | {
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{bucket}/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": s3_endpoint,
        }


def workflow(flow: str, folder: Path, store: dict[str, str], resources: dict[str, Any]) -> dict[str, Any]:
    """What ``argo-workflows create`` would send for a flow whose recipe has these ``resources``."""
    shipped = FLOWS / "recipes" / ("teacher-easyvqa.yaml" if flow == "teacher" else "debug.yaml")
    recipe = folder / "recipe.yaml"
    content = yaml.safe_load(shipped.read_text()) | {"resources": resources}
    if flow == "sweep":
        content = {"name": "study", "recipe": content, "grid": {"hybrid.init": ["aligned", "paper"]}}
    recipe.write_text(yaml.safe_dump(content))
    words = ("--config", "recipe", str(recipe), "argo-workflows", "create", "--only-json")
    code, output = run_flow(folder, *words, flow=f"{flow}_flow.py", **store, **SENSOR)
    assert code == 0, output
    return dict(json.loads(output[output.index("{") : output.rindex("}") + 1]))


@pytest.mark.parametrize(
    "flow", ["train", *(pytest.param(name, marks=pytest.mark.slow) for name in list(COMPUTING)[1:])]
)
def test_every_flow_is_a_workflow_that_holds_together(flow: str, tmp_path: Path, store: dict[str, str]) -> None:
    made = workflow(flow, tmp_path, store, RESOURCES)
    WorkflowTemplate.model_validate(made)
    templates = {template["name"]: template for template in made["spec"]["templates"]}
    assert len(templates) == len(made["spec"]["templates"])
    assert made["spec"]["entrypoint"] in templates
    for name, template in templates.items():
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?", name)
        tasks = {task["name"]: task for task in template.get("dag", {}).get("tasks", [])}
        for task in tasks.values():
            assert task["template"] in templates
            depends = re.findall(r"([a-z][-a-z0-9]*)(?:\.[A-Z]\w*)?", task.get("depends") or "")
            assert set(depends) <= tasks.keys()
            assert set(task.get("dependencies") or []) <= tasks.keys()
    steps = {name: made for name, made in templates.items() if "flow.py" in str(made.get("container"))}
    assert COMPUTING[flow] < steps.keys()
    for name, step in steps.items():
        limit = 1 if name == "evaluate" else 3
        caught = NUM_FALLBACK_RETRIES if (flow, name) in CAUGHT else 0  # to say so where a pod dies
        assert step["retryStrategy"]["limit"] == limit + caught
        _check_step(name, step, name in COMPUTING[flow])


def _check_step(name: str, step: dict[str, Any], computes: bool) -> None:
    container = step["container"]
    assert step["retryStrategy"]["backoff"]["duration"] == "4m"
    requests, gpus = container["resources"]["requests"], container["resources"]["limits"].get("nvidia.com/gpu")
    if not computes:
        memory = 5e9 if name == "prepare-data" else 4.096e9
        assert (container["image"], gpus, float(quantity(requests["memory"]))) == ("matvlm:gpu", None, memory)
        return
    assert (container["image"], gpus) == (GPU, "1" if name == "evaluate" else "2"), name
    assert (float(quantity(requests["cpu"])), float(quantity(requests["memory"]))) == (3, 9e9)
    assert (step["tolerations"], step["nodeSelector"]) == (RESOURCES["tolerations"], RESOURCES["node_selector"])
    assert step["activeDeadlineSeconds"] == 5400


ANNOUNCE = """
import sys
from pathlib import Path
import support, evaluation
for _ in range(2):
    evaluation.announce("models:/matvlm/7", Path(sys.argv[1]) / "announced" / "matvlm-7")
"""


def test_the_event_is_published_once_and_only_on_the_cluster(tmp_path: Path) -> None:
    with listening() as (url, posted):
        variables = {"METAFLOW_ARGO_EVENTS_WEBHOOK_URL": url, "PYTHONPATH": str(FLOWS)}
        for cluster in ({}, {"ARGO_WORKFLOW_TEMPLATE": "trainflow"}):
            command = [sys.executable, "-c", ANNOUNCE, str(tmp_path)]
            done = subprocess.run(command, env=environment(**variables, **cluster), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert len(posted) == len(cluster)
    (event,) = posted
    assert event["name"] == event["payload"]["name"] == EVENT
    assert event["payload"]["checkpoint"] == "models:/matvlm/7"
