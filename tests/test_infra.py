"""What a cluster would be given: the objects of each overlay.

No cluster is at hand. Objects are held to the schemas of Kubernetes and Argo Events; what they refer to has to exist.
"""

from __future__ import annotations

import ast
import base64
import copy
import re
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
from hera.events.models import EventSource
from manifests import (
    INFRA,
    JOBS,
    OVERLAYS,
    ROOT,
    SERVICES,
    Object,
    build,
    containers,
    find,
    labelled,
    name,
    namespace,
    of_kind,
    pods,
)
from metaflow import metaflow_config

OLDEST, NEWEST = "1.31", "1.37"
"""Kubernetes versions whose schemas the objects are held to."""
README = INFRA / "README.md"
METAFLOW = Path(metaflow_config.__file__).parent / "plugins"
WRITES_ITS_ROOT = {"minio"}
"""Containers whose image writes to its own file system."""


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return build(request.param)


def complaints(made: Object) -> list[str]:
    """What the schemas of its kind have against an object; nothing is known of an EventBus."""
    if made["kind"] == "EventBus":
        return []
    if made["kind"] == "EventSource":
        # Written flat, as Argo's own programs read it; the model has what concerns the server one level deeper.
        nested = {key: {"webhookContext": source} for key, source in made["spec"]["webhook"].items()}
        wanted = {"metadata": made["metadata"], "spec": made["spec"] | {"webhook": nested}}
        kept = EventSource.model_validate(wanted).model_dump(by_alias=True, exclude_unset=True, mode="json")
        return [] if kept == wanted else [f"EventSource: unknown fields, only these are known: {kept}"]
    found = []
    for version in (OLDEST, NEWEST):
        try:
            kubernetes_validate.validate(made, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {made['kind']} {name(made)}: {error.message}")
    return found


def test_every_object_fits_its_schema(objects: list[Object]) -> None:
    assert [line for made in objects for line in complaints(made)] == []
    where = [(made["kind"], name(made), namespace(made)) for made in objects]
    assert len(set(where)) == len(where)


def test_the_schemas_see_a_mistake() -> None:
    wrong = copy.deepcopy(of_kind(build("local"), "Deployment")[0])
    wrong["spec"]["replicas"] = "one"
    wrong["spec"]["template"]["spec"]["containers"][0]["imge"] = "x:1"
    assert len(complaints(wrong)) == 2
    source = copy.deepcopy(of_kind(build("local"), "EventSource")[0])
    source["spec"]["webhook"]["metaflow-event"]["pth"] = "/"
    assert complaints(source)


def test_accounts_maps_secrets_and_keys_exist(objects: list[Object]) -> None:
    for made, pod, container in containers(objects):
        where = namespace(made)
        find(objects, "ServiceAccount", pod["serviceAccountName"], where)
        for source in container.get("envFrom", []):
            ((kind, reference),) = source.items()
            find(objects, {"secretRef": "Secret", "configMapRef": "ConfigMap"}[kind], reference["name"], where)
        for variable in container.get("env", []):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in find(objects, "Secret", reference["name"], where)["data"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        claimed = {name(claim) for claim in made["spec"].get("volumeClaimTemplates", [])}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes.keys() | claimed
        for volume in volumes.values():
            if "configMap" in volume:
                find(objects, "ConfigMap", volume["configMap"]["name"], where)


def test_services_reach_pods_and_pods_name_their_ports(objects: list[Object]) -> None:
    for service in of_kind(objects, "Service"):
        (template,) = [
            template
            for made, template in pods(objects)
            if namespace(made) == namespace(service)
            and labelled(template["metadata"]["labels"], {"matchLabels": service["spec"]["selector"]})
        ]
        open_ports = {port["name"] for container in template["spec"]["containers"] for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports
    for made, template in pods(objects):
        assert labelled(template["metadata"]["labels"], made["spec"]["selector"])
        if made["kind"] == "StatefulSet":
            find(objects, "Service", made["spec"]["serviceName"], namespace(made))


def test_tasks_are_told_of_services_that_exist(objects: list[Object]) -> None:
    encoded = find(objects, "Secret", "matvlm-tasks", JOBS)["data"]
    told = {key: base64.b64decode(value).decode() for key, value in encoded.items()}
    for key in {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"} & told.keys():
        host, port = told[key].removeprefix("http://").split(":")
        wanted, where = host.split(".")
        service = find(objects, "Service", wanted, where)
        assert int(port) in [made["port"] for made in service["spec"]["ports"]]
    allowed = find(objects, "ConfigMap", "mlflow", SERVICES)["data"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert told["MLFLOW_TRACKING_URI"].removeprefix("http://") in allowed


def test_roles_are_bound_to_whom_there_is_and_give_away_little(objects: list[Object]) -> None:
    for binding in of_kind(objects, "RoleBinding"):
        find(objects, "Role", binding["roleRef"]["name"], namespace(binding))
        for subject in binding["subjects"]:
            if subject["kind"] == "ServiceAccount":
                find(objects, "ServiceAccount", subject["name"], subject["namespace"])
    assert of_kind(objects, "ClusterRole", "ClusterRoleBinding") == []
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"]
            assert "secrets" not in rule["resources"]
    for account in of_kind(objects, "ServiceAccount"):
        assert namespace(account) == JOBS or account["automountServiceAccountToken"] is False


def test_containers_are_confined_limited_and_watched(objects: list[Object]) -> None:
    for made, pod, container in containers(objects):
        here = f"{name(made)}/{container['name']}"
        assert pod["securityContext"]["runAsNonRoot"], here
        assert pod["securityContext"]["runAsUser"] > 0, here
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, here
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), here
        confined = container["securityContext"]
        assert confined["allowPrivilegeEscalation"] is False, here
        assert confined["capabilities"] == {"drop": ["ALL"]}, here
        assert confined.get("readOnlyRootFilesystem", False) or container["name"] in WRITES_ITS_ROOT, here
        for kind in ("requests", "limits"):
            assert container["resources"][kind].keys() == {"cpu", "memory"}, here
    for made, template in pods(objects):
        for container in template["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), name(made)
            for probe in (container[key] for key in container if key.endswith("Probe") and "httpGet" in container[key]):
                assert probe["httpGet"]["port"] in [port["name"] for port in container["ports"]], name(made)


def test_images_are_pinned_and_ours_are_of_this_version(objects: list[Object]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for _, _, container in containers(objects)}
    for image in images:
        tag = image.rpartition("/")[2].partition(":")[2]
        assert re.search(r"\d", tag), f"{image} has no version"
        assert "latest" not in tag
    assert f"matvlm:cpu-{version}" in {image.rpartition("/")[2] for image in images}
    upstream = re.search(r"^FROM \S+:(\S+)$", (INFRA / "docker/metadata.Dockerfile").read_text(), re.MULTILINE)
    assert upstream
    assert f"matvlm-metadata:{upstream[1]}" in {image.rpartition("/")[2] for image in images}


def test_a_cloud_has_no_volume_and_no_key_of_a_store() -> None:
    assert of_kind(build("cloud"), "StatefulSet", "PersistentVolumeClaim") == []
    assert [key for made in of_kind(build("cloud"), "Secret") for key in made["data"] if "ACCESS_KEY" in key] == []


def test_quotas_hold_in_the_namespace_of_the_tasks(objects: list[Object]) -> None:
    (quota,) = of_kind(objects, "ResourceQuota")
    (limits,) = of_kind(objects, "LimitRange")
    assert namespace(quota) == namespace(limits) == JOBS
    asked = {key.removeprefix("requests.") for key in quota["spec"]["hard"] if key.startswith("requests.")}
    ours = asked - {"nvidia.com/gpu"}  # else a container without a request is refused
    assert limits["spec"]["limits"][0]["defaultRequest"].keys() == ours


def asked_by_metaflow() -> set[tuple[str, str]]:
    """Resource and verb of every call that Metaflow's Kubernetes and Argo plug-ins make to the API of a cluster."""
    verbs = {"read": "get", "replace": "update", "connect_get": "get"}
    names = {"pod": "pods", "pod_exec": "pods/exec", "job": "jobs"}
    asked = set()
    for source in [*METAFLOW.glob("kubernetes/*.py"), *METAFLOW.glob("argo/*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            call = node.func if isinstance(node, ast.Call) else node
            found = isinstance(call, ast.Attribute) and re.fullmatch(r"([a-z_]+?)_namespaced_([a-z_]+)", call.attr)
            if found and found[2] != "custom_object":
                asked.add((names[found[2]], verbs.get(found[1], found[1])))
            elif found and isinstance(node, ast.Call):
                (plural,) = [word.value for word in node.keywords if word.arg == "plural"]
                resource = plural.value if isinstance(plural, ast.Constant) else "jobsets"
                asked.add((resource, verbs.get(found[1], found[1])))
    return asked


def test_launchers_may_do_what_metaflow_does_for_them(objects: list[Object]) -> None:
    rules = find(objects, "Role", "launchers", JOBS)["rules"]
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    asked = asked_by_metaflow()
    assert {("jobs", "create"), ("pods/exec", "get"), ("jobsets", "create"), ("sensors", "update")} <= asked
    assert asked - allowed == set()


def test_no_secret_is_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "infra"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = listed.stdout.split()
    assert [path for path in files if path.endswith(".env")] == []
    written = [path for path in files if path.endswith(".yaml") and "kind: Secret\n" in (ROOT / path).read_text()]
    assert written == []
    for example in (INFRA / "kubernetes").rglob("*.env.example"):
        for line in example.read_text().splitlines():
            key, _, value = line.partition("=")
            assert not re.search("PASSWORD|SECRET", key) or not value, f"{example}: {line}"


def test_the_readme_names_what_there_is() -> None:
    text = README.read_text()
    for path in re.findall(r"(?<![\w/])(?:infra|flows|tests)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or path == "infra/.stack/env", path
    (listing,) = re.findall(r"```\n(stack\.py .*?)```", text, re.DOTALL)
    for line in listing.splitlines():
        assert (INFRA / line.split()[0]).exists(), line
    settings = {f"METAFLOW_{setting}" for setting in dir(metaflow_config)}
    assert set(re.findall(r"METAFLOW_\w+\w", text)) - settings == set()
    versions = set(re.findall(r"matvlm:[cg]pu-([\d.]+\d)", text))
    assert versions == {tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]}


def test_the_costs_follow_from_what_was_measured() -> None:
    """The table of infra/README.md, by the arithmetic that is written below it."""
    text = README.read_text()
    measured = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
    bold = {float(number) for number in re.findall(r"\*\*([\d.]+)\*\*", text)}
    assert {number for number in bold if not re.search(rf"(?<![\d.]){number}(?![\d.])", measured)} == set()
    assert "96.5%" in measured
    samples, doubling = 10_400 * 64, 0.965
    card = 0.31 * 71e12 / (0.31 * 989e12 / 18.2)
    rates = {1: 21.7, 2: 42.1, 8: 8 * 21.8 * doubling**3, 4: 4 * card * doubling**2}
    rows = re.findall(r"^\| (\d) x [^|]+ \| \**([\d.]+)\** ((?:\| [\d.]+ ){3})\|$", text, re.MULTILINE)
    assert len(rows) == len(rates)
    for gpus, rate, rest in rows:
        hours = samples / rates[int(gpus)] / 3600
        expected = [rates[int(gpus)], hours, int(gpus) * hours, 500 * 64 / rates[int(gpus)] / 60]
        assert list(map(float, [rate, *rest.split("|")[1:]])) == pytest.approx(expected, abs=0.051)
