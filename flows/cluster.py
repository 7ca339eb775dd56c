"""What the steps of a flow ask a cluster for, from the recipe's section ``resources``."""

from __future__ import annotations

import os
import sys
from typing import Any

from kubernetes_settings import asked_for
from metaflow import FlowMutator, kubernetes, resources, retry, timeout

from matvlm.config import Resources, StepResources

PLACE = {"image": "image", "node_selector": "node_selector", "tolerations": "tolerations", "disk": "disk_mb"}
"""Of Metaflow's ``@kubernetes``: what ``@resources`` has no word for, and where the recipe has it."""
SAID_OF = {"distill_on_nodes": "distill"}
"""Steps that a recipe knows by another name."""


class Cluster(FlowMutator):
    """Decorates each step with what the recipe says of it, which goes before what ``--with kubernetes:...`` says.

    ``computes``: the steps that work with a model.
    """

    def init(self, *computes: str) -> None:
        self.computes = computes

    def mutate(self, mutable_flow: Any) -> None:
        given = dict(mutable_flow.configs)["recipe"]
        wanted = Resources.model_validate(given.get("recipe", given)["resources"])  # of a sweep, its base recipe's
        elsewhere = asked_for(sys.argv) or "METAFLOW_KUBERNETES_WORKLOAD" in os.environ
        for name, step in mutable_flow.steps:
            said = SAID_OF.get(name, name)
            own: StepResources = wanted.of(said) if said in self.computes else wanted.own(said)
            _decorate(step, own, elsewhere)
            retries = wanted.of(said).retries
            if elsewhere and retries:
                again = {"times": retries, "minutes_between_retries": wanted.retry_minutes}
                step.add_decorator(retry, deco_kwargs=again)


def _decorate(step: Any, own: StepResources, elsewhere: bool) -> None:
    size = {"cpu": own.cpu, "memory": own.memory_mb, "gpu": own.gpu, "shared_memory": own.shared_memory_mb}
    if size := {name: value for name, value in size.items() if value is not None}:
        step.add_decorator(resources, deco_kwargs=size)
    if own.timeout_hours:
        step.add_decorator(timeout, deco_kwargs={"seconds": round(own.timeout_hours * 3600)})
    place = {name: value for name, field in PLACE.items() if (value := getattr(own, field)) is not None}
    if elsewhere and place:
        given: dict[str, Any] = next((asked for *_, asked in step.get_decorator_specs("kubernetes")), {})  # by --with
        asked = {name: value for name, value in (given | place).items() if value is not None}
        step.add_decorator(kubernetes, deco_kwargs=asked, duplicates=step.OVERRIDE)
