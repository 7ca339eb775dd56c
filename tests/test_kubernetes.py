"""The cluster on loopback does as a real one would, asked with Kubernetes' own client; and a flow's step runs there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kube.examples import broken, job, jobset
from kube.launch import IMAGE, NAMESPACE, api_client, cluster, core, step_of
from kube.pods import expand
from kube.schema import quantity
from kube.server import Api, serve
from kubernetes import client
from kubernetes.dynamic import DynamicClient

KUBE = Path(__file__).parent / "kube"
JOBSETS = ("jobset.x-k8s.io", "v1alpha2", NAMESPACE, "jobsets")
SECRET = {"TOKEN": "from a secret"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serve(tmp_path_factory.mktemp("kube"), {"known": SECRET}) as started:
        yield started


def create(api: Api, made: Any) -> str:
    """The name of the Job that came of it."""
    return str(client.BatchV1Api(api_client(api)).create_namespaced_job(NAMESPACE, made).metadata.name)


def create_set(api: Api, made: Any) -> str:
    """The name of a JobSet."""
    custom = client.CustomObjectsApi(api_client(api))
    return str(custom.create_namespaced_custom_object(*JOBSETS, made)["metadata"]["name"])


def pods_of(api: Api, name: str) -> list[Any]:
    return list(core(api).list_namespaced_pod(NAMESPACE, label_selector=f"job-name={name}").items)


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """What ``condition`` says as soon as it says something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def end_of(api: Api, name: str) -> Any:
    """The Job's status once it has ended."""
    batch = client.BatchV1Api(api_client(api))
    return until(lambda: (status := batch.read_namespaced_job(name, NAMESPACE).status).conditions and status)


def test_a_pod_sees_its_own_variables_and_no_others(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_TESTS", "1")
    fields = {
        "NAME": "metadata.name",
        "UID_OF": "metadata.uid",
        "MARK": "metadata.labels['mark']",
        "NONE": "metadata.labels['x']",
    }
    env: list[dict[str, Any]] = [
        {"name": key, "valueFrom": {"fieldRef": {"fieldPath": p}}} for key, p in fields.items()
    ]
    env += [{"name": "PLAIN", "value": "1"}, {"name": "BOTH", "value": "$(NAME) $(TOKEN) $(NOT)"}]
    made = job("env; pwd", env=env, envFrom=[{"secretRef": {"name": "known"}}])
    made["spec"]["template"]["metadata"] = {"labels": {"mark": "here"}}
    name = create(api, made)
    assert end_of(api, name).succeeded == 1
    (pod,) = pods_of(api, name)
    assert pod.status.phase == "Succeeded"
    assert pod.status.container_statuses[0].state.terminated.reason == "Completed"
    log = core(api).read_namespaced_pod_log(pod.metadata.name, NAMESPACE, _preload_content=False)
    *lines, here = log.data.decode().splitlines()
    seen = dict(line.split("=", 1) for line in lines)
    assert (seen["NAME"], seen["UID_OF"]) == (pod.metadata.name, pod.metadata.uid)
    assert (seen["MARK"], seen["NONE"], seen["PLAIN"], seen["TOKEN"]) == ("here", "", "1", "from a secret")
    assert seen["BOTH"] == f"{pod.metadata.name} from a secret $(NOT)"
    assert seen["HOME"] == here
    assert pod.metadata.name in here
    assert "OF_THE_TESTS" not in seen


def test_the_image_has_the_packages_but_not_the_library(api: Api) -> None:
    name = create(api, job("""python -c 'import boto3, sys; print(sys.prefix); import matvlm'"""))
    assert end_of(api, name).failed == 1
    (pod,) = pods_of(api, name)
    state = pod.status.container_statuses[0].state.terminated
    assert (pod.status.phase, state.exit_code, state.reason) == ("Failed", 1, "Error")
    assert state.message.endswith("ModuleNotFoundError: No module named 'matvlm'\n")


def test_a_job_has_as_many_pods_as_its_limit_allows(api: Api) -> None:
    name = create(api, job("exit 3", spec={"backoffLimit": 2}))
    status = end_of(api, name)
    assert (status.failed, status.active, status.conditions[0].reason) == (3, 0, "BackoffLimitExceeded")
    codes = [pod.status.container_statuses[0].state.terminated.exit_code for pod in pods_of(api, name)]
    assert codes == [3, 3, 3]


def test_a_deleted_pod_dies_with_its_children_and_counts_as_a_failure(api: Api, tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    name = create(
        api, job(f"(while sleep 0.05; do touch {mark}; done) & setsid sleep 60 & wait", spec={"backoffLimit": 1})
    )
    until(mark.exists)
    (first,) = pods_of(api, name)
    core(api).delete_namespaced_pod(first.metadata.name, NAMESPACE)
    (second,) = pods_of(api, name)
    assert second.metadata.name != first.metadata.name
    core(api).delete_namespaced_pod(second.metadata.name, NAMESPACE)
    assert end_of(api, name).failed == 2
    assert pods_of(api, name) == []
    time.sleep(0.2)
    mark.unlink()
    time.sleep(0.3)
    assert not mark.exists()


def test_parallelism_zero_ends_the_pods_and_is_no_failure(api: Api) -> None:
    name = create(api, job("sleep 60"))
    batch = client.BatchV1Api(api_client(api))
    batch.patch_namespaced_job(name, NAMESPACE, body={"spec": {"parallelism": 0}})
    found = batch.read_namespaced_job(name, NAMESPACE)
    assert (found.spec.parallelism, found.status.active, found.status.failed) == (0, 0, None)
    assert pods_of(api, name) == []
    batch.delete_namespaced_job(name, NAMESPACE)
    with pytest.raises(client.ApiException) as caught:
        batch.read_namespaced_job(name, NAMESPACE)
    assert caught.value.status == 404


def test_deadlines_and_lifetimes_are_kept(api: Api) -> None:
    late = create(api, job("sleep 60", pod={"activeDeadlineSeconds": 1}))
    gone = create(api, job("true", spec={"ttlSecondsAfterFinished": 0}))
    assert end_of(api, late).failed == 1
    (pod,) = pods_of(api, late)
    assert (pod.status.reason, pod.status.container_statuses[0].state.terminated.exit_code) == ("DeadlineExceeded", 137)
    batch = client.BatchV1Api(api_client(api))
    until(lambda: gone not in [one.metadata.name for one in batch.list_namespaced_job(NAMESPACE).items])
    assert pods_of(api, gone) == []


def test_a_pod_waits_for_a_secret_that_is_missing(api: Api) -> None:
    name = create(api, job("true", envFrom=[{"secretRef": {"name": "unknown"}}]))
    (pod,) = core(api).list_namespaced_pod(NAMESPACE, field_selector="status.phase=Pending").items
    assert pod.metadata.labels["job-name"] == name
    assert pod.status.container_statuses[0].state.waiting.message == "secret 'unknown' not found"


@pytest.mark.parametrize(("code", "expected"), [(0, "Completed"), (1, "Failed")])
def test_a_jobset_is_done_when_its_jobs_are_and_fails_with_one(api: Api, code: int, expected: str) -> None:
    custom = client.CustomObjectsApi(api_client(api))
    name = create_set(api, jobset(control="sleep 60" if code else "true", worker=f"exit {code}"))
    place = (*JOBSETS, name)
    status = until(lambda: (found := custom.get_namespaced_custom_object(*place)["status"]).get("conditions") and found)
    assert status["conditions"][0]["type"] == expected
    rows = {row["name"]: (row["active"], row["succeeded"], row["failed"]) for row in status["replicatedJobsStatus"]}
    assert rows["worker"] == (0, 1 - code, code)
    label = f"jobset.sigs.k8s.io/jobset-name={name}"
    left = core(api).list_namespaced_pod(NAMESPACE, label_selector=label).items
    assert {pod.status.phase for pod in left} == ({"Failed"} if code else {"Succeeded"})
    custom.delete_namespaced_custom_object(*place)
    assert core(api).list_namespaced_pod(NAMESPACE, label_selector=label).items == []


CONTAINER = "spec.template.spec.containers.0"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("kind", "JobSet", "is none of jobs"),
        ("spec.retries", 1, "unexpected"),
        ("spec.backoffLimit", "none", "is not of type"),
        ("metadata.generateName", "Big_", "is not a name"),
        ("metadata.labels", {"flow": "a b"}, "is not a label's value"),
        ("metadata.annotations", {"attempt": 1}, "is not of type"),
        ("spec.template.spec.restartPolicy", "Always", "a Job takes Never and OnFailure"),
        ("spec.template.spec.tolerations", [{"effects": "NoSchedule"}], "unexpected"),
        (f"{CONTAINER}.name", "init_hybrid", "is not a name"),
        (f"{CONTAINER}.image", "", "has to be named"),
        (f"{CONTAINER}.env", [{"name": "A", "value": 1}], "is not of type"),
        (
            f"{CONTAINER}.env",
            [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}],
            "no such field: spec.x",
        ),
        (f"{CONTAINER}.volumeMounts", [{"name": "runs", "mountPath": "/runs"}], "no volume is named runs"),
        (f"{CONTAINER}.resources", {"requests": {"memory": "8 GB"}}, "is not a quantity"),
        (f"{CONTAINER}.resources", {"limits": {"nvidia.com/gpu": "0.5"}}, "is not a whole number"),
        (f"{CONTAINER}.resources", {"requests": {"nvidia.com/gpu": "1"}}, "have to be equal"),
        (f"{CONTAINER}.resources", {"requests": {"cpu": "2"}, "limits": {"cpu": "1500m"}}, "is more than the limit"),
    ],
)
def test_a_job_that_a_cluster_would_refuse_is_refused(api: Api, path: str, value: Any, complaint: str) -> None:
    before = len(api.cluster.created)
    with pytest.raises(client.ApiException, match=complaint) as caught:
        create(api, broken(path, value, job("true")))
    assert caught.value.status == 422
    assert complaint in api.refused[-1]
    assert len(api.cluster.created) == before


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("spec.parallelism", 2, "unknown"),
        ("spec.startupPolicy", {"startupPolicyOrder": "Random"}, "neither AnyOrder nor InOrder"),
        ("spec.replicatedJobs.1.name", "control", "different names"),
        ("spec.replicatedJobs.1.replicas", "1", "is not a number of Jobs"),
        ("spec.replicatedJobs.0.template.spec.template.spec.hostname", 1, "is not of type"),
        ("metadata.annotations", {"attempt": 1}, "is not a string"),
        ("metadata.name", "js-" + "x" * 60, "at most 63"),
    ],
)
def test_a_jobset_that_a_cluster_would_refuse_is_refused(api: Api, path: str, value: Any, complaint: str) -> None:
    with pytest.raises(client.ApiException, match=complaint) as caught:
        create_set(api, broken(path, value, jobset(control="true", worker="true")))
    assert caught.value.status == 422


def test_it_says_what_it_has_and_whom_it_knows(api: Api) -> None:
    dynamic = DynamicClient(api_client(api))
    sets = dynamic.resources.get(api_version="jobset.x-k8s.io/v1alpha2", kind="JobSet")
    made = jobset(control="true", worker="true")
    assert sets.create(namespace=NAMESPACE, body=made).metadata.name == made["metadata"]["name"]
    assert made["metadata"]["name"] in [one.metadata.name for one in sets.get(namespace=NAMESPACE).items]
    with pytest.raises(client.ApiException) as taken:
        create_set(api, made)
    stranger = api_client(api)
    stranger.configuration.api_key = {}
    with pytest.raises(client.ApiException) as refused:
        client.CoreV1Api(stranger).list_namespaced_pod(NAMESPACE)
    assert (taken.value.status, refused.value.status) == (409, 401)


def test_quantities_and_variables_are_read_as_kubernetes_does() -> None:
    amounts = {"1500m": 1.5, "4096M": 4.096e9, "8000.0M": 8e9, "2Gi": 2**31, "1e3": 1000, "2": 2}
    assert {text: float(quantity(text)) for text in amounts} == amounts
    known = {"A": "1"}
    texts = {"$(A)": "1", "$$(A)": "$(A)", "$(pwd) $A ${A}": "$(pwd) $A ${A}", "$(A": "$(A", "c=$?": "c=$?"}
    assert {text: expand(text, known) for text in texts} == texts


def test_a_step_runs_on_it(tmp_path: Path) -> None:
    with cluster(tmp_path, GREETING="good day") as launcher:
        flow = launcher.start(KUBE / "quick_flow.py", "run")
        assert flow.wait(120) == 0, flow.output
        (made,) = launcher.api.cluster.created
    for line in ("good day, says a pod", "the pod said good day"):
        assert line in flow.output
    assert step_of(made) == "start"
    (container,) = made["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["envFrom"]) == (IMAGE, [{"secretRef": {"name": "matvlm-tasks"}}])
