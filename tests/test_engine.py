"""The engines: torch's does what it says; DeepSpeed's does the same, and each continues from the other's state."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matvlm.config import Distill
from matvlm.distill.engine import TorchEngine, make_engine
from matvlm.optimizer import adamw

RATES = [1e-2, 2e-2, 5e-3, 5e-3, 1e-2]
MICRO_BATCHES = 2
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def settings(engine: str = "torch", stage: int = 1) -> Distill:
    return Distill.model_validate(
        {
            "engine": engine,
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"clip_grad_norm": 0.5, "weight_decay": 0.1},
            "deepspeed": {"zero_stage": stage},
        }
    )


class Model(nn.Module):
    """Matrices and vectors; the first has never a gradient, and ``frozen`` is not to be trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.unused, self.inner, self.bias = normal(3, 3), normal(16, 8), normal(16)
        self.outer, self.frozen = normal(1, 16), normal(8, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x @ self.frozen @ self.inner.T + self.bias) @ self.outer.T

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def micro_batches(update: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(update)
    return list(torch.randn(2 * MICRO_BATCHES, 8, generator=generator).split(2))


def train(
    engine: Any, model: Model, updates: Iterable[int], broken: Mapping[int, tuple[int, float]] = MappingProxyType({})
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each update; ``broken`` ones have one input (micro-batch, factor) multiplied."""
    seen = []
    for update in updates:
        total = 0.0
        chosen, factor = broken.get(update, (0, 1.0))
        for number, x in enumerate(micro_batches(update), start=1):
            x = x * factor if number == chosen else x
            loss = (model(x) - x.sum(1, keepdim=True)).square().sum() / 4
            engine.backward(loss, last=number == MICRO_BATCHES)
            total += float(loss.detach())
        seen.append((total, engine.step(RATES[update])))
    return seen


def start(engine: str = "torch", stage: int = 1, state: Any = None) -> tuple[Any, Model]:
    model = Model()
    made = make_engine(model.trained(), settings(engine, stage), "cpu")
    if state is not None:
        made.load_state(state)
    return made, model


def flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for name, entry in state.items() for key, value in entry.items()}


def test_torch_engine_is_adamw_on_clipped_gradients() -> None:
    engine, model = start()
    seen = train(engine, model, range(5))
    other = Model()
    matrices = [other.inner, other.outer]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [other.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for update, (loss, norm) in enumerate(seen):
        optimizer.zero_grad()
        whole = torch.cat(micro_batches(update))
        mine = (other(whole) - whole.sum(1, keepdim=True)).square().sum() / 4
        mine.backward()
        gradients = [parameter.grad for parameter in (*matrices, other.bias) if parameter.grad is not None]
        length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert length > 0.5, "clipping has something to do"
        for gradient in gradients:
            gradient.mul_(0.5 / length)
        for group in optimizer.param_groups:
            group["lr"] = RATES[update]
        optimizer.step()
        assert loss == pytest.approx(float(mine.detach()), rel=1e-5)  # measured: 2e-7
        assert norm == pytest.approx(float(length), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), atol=1e-6, rtol=0)  # measured: 1e-7
    assert torch.equal(model.unused, Model().unused)


def test_vectors_have_no_weight_decay() -> None:
    model = Model()
    optimizer = adamw(model.trained().values(), settings().optimizer)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in (model.unused, model.inner, model.outer, model.bias)] == [0.1, 0.1, 0.1, 0.0]
    assert len(decays) == 4


def test_a_continued_torch_engine_is_bitwise_the_same() -> None:
    whole, model = start()
    expected = train(whole, model, range(5))
    first, first_model = start()
    seen = train(first, first_model, range(3))
    state = first.state()
    kept = {name: value.clone() for name, value in flat(state).items()}
    continued, other = start(state=state)
    assert seen + train(continued, other, range(3, 5)) == expected
    for name, value in flat(continued.state()).items():
        assert torch.equal(value, flat(whole.state())[name]), name
    train(first, first_model, range(3, 5))
    assert all(torch.equal(value, flat(state)[name]) for name, value in kept.items()), "a state is a copy"
    assert set(state["unused"]) == set(state["inner"]) == {"value", "exp_avg", "exp_avg_sq", "step"}
    assert float(state["inner"]["step"]) == 3


def test_the_state_before_the_first_update_is_a_start() -> None:
    fresh, _ = start()
    engine, model = start(state=fresh.state())
    again, other = start()
    assert train(engine, model, range(3)) == train(again, other, range(3))


BROKEN = {0: (1, math.nan), 2: (1, math.inf), 3: (2, math.nan)}
"""The first update, where no moment is there yet, and two in a row; in the first and in the last micro-batch."""


def test_a_skipped_update_leaves_no_trace() -> None:
    engine, model = start()
    seen = train(engine, model, range(5), BROKEN)
    assert not any(math.isfinite(seen[update][1]) for update in BROKEN)
    other, clean = start()
    assert [seen[1], seen[4]] == train(other, clean, [1, 4])
    for name, value in flat(engine.state()).items():
        assert torch.equal(value, flat(other.state())[name]), name
    assert float(engine.state()["inner"]["step"]) == 2


def test_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = Model().trained()
    assert isinstance(make_engine(parameters, settings("torch"), "cuda"), TorchEngine)
    assert isinstance(make_engine(parameters, settings("auto"), "cpu"), TorchEngine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(make_engine(parameters, settings("auto"), "cuda"), TorchEngine)
    with pytest.raises(ValueError, match=r"distill\.engine is 'deepspeed', which is not installed: pip install"):
        make_engine(parameters, settings("deepspeed"), "cpu")


def deepspeed_side(folder: Path) -> None:
    """In a process of its own, as DeepSpeed leaves environment variables and a process group behind."""
    torch.set_num_threads(1)
    given = torch.load(folder / "torch.pt", weights_only=True)
    found: dict[str, Any] = {}
    for stage in (1, 2):
        engine, model = start("deepspeed", stage)
        skipped = train(engine, model, [0], BROKEN)
        found[f"first{stage}"] = {"state": engine.state()}
        skipped += train(engine, model, range(1, 5), BROKEN)
        found[f"skipped{stage}"] = {"seen": skipped, "state": engine.state()}
        engine, model = start("deepspeed", stage)
        found[f"clean{stage}"] = {"seen": train(engine, model, [1, 4]), "state": engine.state()}
        engine, model = start("deepspeed", stage)
        found[f"fresh{stage}"] = {"seen": train(engine, model, range(3)), "state": engine.state()}
        found[f"fresh{stage}"]["frozen"] = model.frozen
        continued, model = start("deepspeed", stage, state=given)
        found[f"loaded{stage}"] = {"state": continued.state()}
        found[f"continued{stage}"] = {"seen": train(continued, model, range(3, 5)), "state": continued.state()}
    torch.save(found, folder / "deepspeed.pt")


@pytest.fixture(scope="module")
def deepspeed_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    engine, model = start()
    train(engine, model, range(3))
    torch.save(engine.state(), folder / "torch.pt")
    code = f"import pathlib, test_engine; test_engine.deepspeed_side(pathlib.Path({str(folder)!r}))"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = torch.load(folder / "deepspeed.pt", weights_only=True)
    return results


def assert_same_run(found: dict[str, Any], seen: list[tuple[float, float]], state: dict[str, Any]) -> None:
    for mine, theirs in zip(found["seen"], seen, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)  # measured: 4e-8
    assert_same_state(found["state"], state, atol=1e-6)  # measured: 1e-7


def assert_same_state(found: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    found, expected = flat(found), flat(expected)
    trained = {name for name in expected if not name.startswith("unused/")}
    assert found.keys() == expected.keys()
    for name in sorted(trained):
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_does_what_torch_does(deepspeed_results: dict[str, Any], stage: int) -> None:
    engine, model = start()
    seen = train(engine, model, range(3))
    assert_same_run(deepspeed_results[f"fresh{stage}"], seen, engine.state())
    assert torch.equal(deepspeed_results[f"fresh{stage}"]["frozen"], model.frozen)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_skips_without_a_trace(deepspeed_results: dict[str, Any], stage: int) -> None:
    skipped, clean = deepspeed_results[f"skipped{stage}"], deepspeed_results[f"clean{stage}"]
    assert not any(math.isfinite(skipped["seen"][update][1]) for update in BROKEN)
    assert [skipped["seen"][update] for update in (1, 4)] == clean["seen"]
    assert_same_state(skipped["state"], clean["state"], atol=0)
    assert_same_state(deepspeed_results[f"first{stage}"]["state"], start()[0].state(), atol=0)
    assert float(clean["state"]["inner"]["step"]) == float(skipped["state"]["inner"]["step"]) == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_continues_what_torch_began(deepspeed_results: dict[str, Any], stage: int) -> None:
    engine, model = start()
    train(engine, model, range(3))
    assert_same_state(deepspeed_results[f"loaded{stage}"]["state"], engine.state(), atol=0)
    seen = train(engine, model, range(3, 5))
    assert_same_run(deepspeed_results[f"continued{stage}"], seen, engine.state())


@pytest.mark.parametrize("stage", [1, 2])
def test_torch_continues_what_deepspeed_began(deepspeed_results: dict[str, Any], stage: int) -> None:
    engine, model = start()
    train(engine, model, range(3))
    expected = train(engine, model, range(3, 5))
    continued, other = start(state=deepspeed_results[f"fresh{stage}"]["state"])
    assert_same_run(
        {"seen": train(continued, other, range(3, 5)), "state": continued.state()}, expected, engine.state()
    )
