"""The network policies of each overlay, asked as a network plug-in would be who reaches whom."""

from __future__ import annotations

import pytest
from manifests import JOBS, OVERLAYS, Object, build, labelled, name, namespace, of_kind, pods

TASK = (JOBS, {"app.kubernetes.io/part-of": "metaflow"})


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return build(request.param)


def peer_is(peer: Object, policy: Object, place: tuple[str, dict[str, str]]) -> bool:
    where, labels = place
    spaces = peer.get("namespaceSelector")
    near = (
        labelled({"kubernetes.io/metadata.name": where}, spaces) if spaces is not None else where == namespace(policy)
    )
    return near and labelled(labels, peer.get("podSelector", {}))


def lets(
    objects: list[Object],
    direction: str,
    own: tuple[str, dict[str, str]],
    other: tuple[str, dict[str, str]] | None,
    port: int,
) -> bool:
    """Whether the policies of a pod let TCP through; ``other`` is the other end, None outside the cluster."""
    policies = [
        policy
        for policy in of_kind(objects, "NetworkPolicy")
        if namespace(policy) == own[0]
        and labelled(own[1], policy["spec"]["podSelector"])
        and direction in policy["spec"]["policyTypes"]
    ]
    side = {"Ingress": "from", "Egress": "to"}[direction]
    for policy in policies:
        for rule in policy["spec"].get(direction.lower(), []):
            ports = [entry["port"] for entry in rule.get("ports", []) if entry["protocol"] == "TCP"]
            ends = rule.get(side)
            met = ends is None or (other is not None and any(peer_is(peer, policy, other) for peer in ends))
            if met and ("ports" not in rule or port in ports):
                return True
    return not policies


def reaches(objects: list[Object], source: str, target: str, port: int) -> bool:
    """Whether a pod, by name, reaches another; ``outside`` is any address beyond the cluster."""
    ends = {name(made): (namespace(made), template["metadata"]["labels"]) for made, template in pods(objects)}
    ends |= {"task": TASK, "webhook": (JOBS, {"eventsource-name": "webhook"})}
    start, end = ends.get(source), ends.get(target)
    leaves = start is None or lets(objects, "Egress", start, end, port)
    return leaves and (end is None or lets(objects, "Ingress", end, start, port))


def test_who_reaches_whom(objects: list[Object]) -> None:
    open_ways = {
        ("task", "mlflow", 5000),
        ("task", "metadata", 8080),
        ("task", "outside", 443),
        ("task", "task", 29500),
    }
    open_ways |= {("mlflow", "outside", 443), ("task", "webhook", 12000)}
    closed_ways = {("outside", "mlflow", 5000), ("outside", "task", 22), ("metadata", "mlflow", 5000)}
    closed_ways |= {
        ("mlflow", "outside", 22),
        ("task", "outside", 22),
        ("metadata", "outside", 443),
        ("task", "mlflow", 22),
        ("mlflow", "task", 29500),
    }
    if of_kind(objects, "StatefulSet"):
        open_ways |= {("mlflow", "postgres", 5432), ("metadata", "postgres", 5432)}
        open_ways |= {("mlflow", "minio", 9000), ("task", "minio", 9000)}
        closed_ways |= {("task", "postgres", 5432), ("outside", "postgres", 5432), ("metadata", "minio", 9000)}
        closed_ways |= {("minio", "outside", 443), ("postgres", "outside", 443), ("minio", "postgres", 5432)}
    else:
        open_ways |= {("mlflow", "outside", 5432), ("metadata", "outside", 5432)}
        closed_ways |= {("task", "outside", 5432)}
    assert {way for way in open_ways if not reaches(objects, *way)} == set()
    assert {way for way in closed_ways if reaches(objects, *way)} == set()


def test_policies_select_what_exists(objects: list[Object]) -> None:
    spaces = {name(made) for made in of_kind(objects, "Namespace")}
    for space in spaces:  # a pod that no policy selects is open to all
        everybody = [made for made in of_kind(objects, "NetworkPolicy") if not made["spec"]["podSelector"]]
        directions = [made["spec"]["policyTypes"] for made in everybody if namespace(made) == space]
        assert {"Ingress", "Egress"} <= set().union(*directions)
    for policy in of_kind(objects, "NetworkPolicy"):
        selected = policy["spec"]["podSelector"]
        here = [template for made, template in pods(objects) if namespace(made) == namespace(policy)]
        assert not selected or any(labelled(template["metadata"]["labels"], selected) for template in here), name(
            policy
        )
        for rule in policy["spec"].get("ingress", []) + policy["spec"].get("egress", []):
            for peer in rule.get("from", []) + rule.get("to", []):
                if "namespaceSelector" in peer:
                    assert peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] in spaces
