"""What a run says of its speed: phases that add up, rates by hand, operations that are those of its matrices."""

from __future__ import annotations

import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distill import Stage, make_stage
from torch import nn

from matvlm.data.encoding import Encoder
from matvlm.data.prepare import open_dataset
from matvlm.distill.feed import Feed
from matvlm.distill.flops import attention_kernels, flops_per_token
from matvlm.distill.run import Run, open_models
from matvlm.distill.speed import PHASES, Speed
from matvlm.reporting import Reporter
from matvlm.targets import open_targets
from matvlm.world import World


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


def test_phases_share_the_time() -> None:
    speed = Speed("cpu")
    for _ in range(2):
        time.sleep(0.03)
        speed.mark("data")
        time.sleep(0.09)
        speed.mark("teacher")
    speed.add(6, 60)
    rates = speed.rates()
    shares = {phase: rates[f"share_{phase}"] for phase in PHASES}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["teacher"] == pytest.approx(0.75, abs=0.1)
    assert shares["student"] == shares["backward"] == shares["optimizer"] == 0.0
    assert 10 < rates["samples_per_second"] < 25
    assert rates["tokens_per_second"] == pytest.approx(10 * rates["samples_per_second"])
    assert "mfu" not in rates
    assert speed.rates()["samples_per_second"] == 0.0, "they begin anew"


def test_share_of_the_peak_by_hand() -> None:
    speed = Speed("cpu", processes=2)
    speed.peak, speed.flops_per_token = 1e12, 4e9
    time.sleep(0.05)
    speed.add(10, 1000)
    rates = speed.rates()
    assert rates["tflops_per_second"] == pytest.approx(4e9 * rates["tokens_per_second"] / 2 / 1e12)
    assert rates["mfu"] == pytest.approx(rates["tflops_per_second"])


class Filed(Reporter):
    """Keeps which files it was given."""

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files = [*getattr(self, "files", []), path.name]


def test_a_trace_of_some_updates(stage: Stage, tmp_path: Path) -> None:
    filed = Filed()
    stage.run(tmp_path, filed, recipe=stage.but(profile_updates=2, max_updates=5))
    assert "trace.json.gz" in filed.files
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 2, steps
    assert any("addmm" in event.get("name", "") for event in events)
    stage.run(tmp_path / "without", other := Filed(), recipe=stage.but(max_updates=1))
    assert "trace.json.gz" not in other.files


def test_operations_are_those_of_the_matrices(stage: Stage) -> None:
    """Those of every linear layer by its size, and what is no linear layer (attention, patches, scan) on top."""
    recipe = stage.but(loss={"layer_inputs": "student_forced"})
    student, teacher, processor = open_models(recipe, stage.student, stage.teacher, "cpu")
    run = Run(recipe, "cpu", student, teacher, open_targets(stage.targets.uri))
    share = next(Feed(recipe, open_dataset(stage.data), Encoder(processor, 64), World()).shares(1, 1))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    linear = 0

    def count(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        nonlocal linear
        products = 2 * module.weight.numel() * output.shape[:-1].numel()
        backward = (args[0].requires_grad + module.weight.requires_grad) if torch.is_grad_enabled() else 0
        linear += products * (1 + backward)

    modules = [*student.modules(), *(part for kept in run.trunk.attentions.values() for part in kept.modules())]
    hooks = [module.register_forward_hook(count) for module in modules if isinstance(module, nn.Linear)]
    counted = flops_per_token(run.steps, share.groups[0], recipe.distill.loss)
    for hook in hooks:
        hook.remove()
    tokens = int(share.groups[0].parts[0].real.sum())
    assert linear > 0
    # Measured: 1.12 times, with the attentions' products, the patches' embedding and the scan's.
    assert linear < counted * tokens < 1.4 * linear
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


KERNELS = ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward")


@pytest.mark.parametrize("groups", [8, 2])
def test_operations_of_attention_are_those_of_its_products(groups: int) -> None:
    """Also where keys have fewer heads than queries, which torch 2.11 does not count."""
    query, key, value = (2, 8, 10, 16), (2, groups, 12, 16), (2, groups, 12, 16)
    scores, mixed = (2, 8, 10, 16, 12), (2, 8, 10, 12, 16)  # [B, H, Q, D] x [D, K] and [B, H, Q, K] x [K, E]
    forward, backward = (attention_kernels()[getattr(torch.ops.aten, name)] for name in KERNELS)
    assert forward(query, key, value) == 2 * (math.prod(scores) + math.prod(mixed))
    assert backward(query, query, key, value) == 2 * (3 * math.prod(scores) + 2 * math.prod(mixed))
