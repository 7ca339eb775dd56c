"""The engines: torch's does what it says; DeepSpeed's does the same, and each continues from the other's state."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_distill import Kept, Stage, make_stage
from torch import Tensor, nn

from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import DeepSpeed, Distill, Recipe
from matvlm.distill.deepspeed import Zero3Engine
from matvlm.distill.engine import TorchEngine, make_engine
from matvlm.optimizer import adamw
from matvlm.world import World, join

RATES = [1e-2, 2e-2, 5e-3, 5e-3, 1e-2]
MICRO_BATCHES = 2
ALONE = World()
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


CASES: Mapping[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "1 offloaded": {"zero_stage": 1, "offload_optimizer": True},
    "2": {"zero_stage": 2},
    "2 offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "3": {"zero_stage": 3},
    "3 offloaded": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
}
STAGES = [case for case in CASES if "offloaded" not in case]
every_run = pytest.mark.parametrize(
    ("processes", "case"), [*((1, case) for case in CASES), *((2, case) for case in STAGES)]
)


def settings(engine: str = "torch", case: str = "1") -> Distill:
    return Distill.model_validate(
        {
            "engine": engine,
            "batch_size": 4,
            "micro_batch_size": 2,
            "optimizer": {"clip_grad_norm": 0.5, "weight_decay": 0.1},
            "deepspeed": CASES[case],
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
    engine: Any,
    model: Model,
    updates: Iterable[int],
    broken: Mapping[int, tuple[int, float]] = MappingProxyType({}),
    world: World = ALONE,
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each update; ``broken`` ones have one input (micro-batch, factor) multiplied.

    The processes of ``world`` share the samples of each micro-batch.
    """
    seen = []
    for update in updates:
        total = 0.0
        chosen, factor = broken.get(update, (0, 1.0))
        for number, x in enumerate(micro_batches(update), start=1):
            x = (x * factor if number == chosen else x)[world.rank :: world.size]
            loss = (model(x) - x.sum(1, keepdim=True)).square().sum() / 4
            engine.backward(loss, last=number == MICRO_BATCHES)
            total += float(loss.detach())
        seen.append((sum(world.gather(total)), engine.step(RATES[update])))
    return seen


def start(engine: str = "torch", case: str = "1", state: Any = None, world: World = ALONE) -> tuple[Any, Model]:
    model = Model()
    made = make_engine(model.trained(), settings(engine, case), "cpu", world, [model])
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
    """In processes of their own, as DeepSpeed leaves environment variables and a process group behind."""
    torch.set_num_threads(1)
    world, _ = join("cpu")
    given = torch.load(folder / "torch.pt", weights_only=True)
    cases = CASES if world.size == 1 else STAGES
    found = {case: alone(case, given) if world.size == 1 else together(case, given, world) for case in cases}
    if world.is_first:
        torch.save(found, folder / f"{world.size}.pt")
    world.leave()


def alone(case: str, given: Any) -> dict[str, Any]:
    engine, model = start("deepspeed", case)
    seen = train(engine, model, [0], BROKEN)
    found: dict[str, Any] = {"first": engine.state()}
    seen += train(engine, model, range(1, 5), BROKEN)
    found["skipped"] = {"seen": seen, "state": engine.state()}
    engine, model = start("deepspeed", case)
    found["clean"] = {"seen": train(engine, model, [1, 4]), "state": engine.state()}
    return found | together(case, given, ALONE)


def together(case: str, given: Any, world: World) -> dict[str, Any]:
    engine, model = start("deepspeed", case, world=world)
    found: dict[str, Any] = {"fresh": {"seen": train(engine, model, range(3), world=world), "state": engine.state()}}
    sizes = [parameter.numel() for parameter in model.parameters()]
    with engine.whole():
        found["fresh"]["weights"] = {name: value.detach().clone() for name, value in model.named_parameters()}
    found["fresh"]["between"] = sizes
    continued, model = start("deepspeed", case, given, world)
    found["loaded"] = {"state": continued.state()}
    found["continued"] = {"seen": train(continued, model, range(3, 5), world=world), "state": continued.state()}
    return found


Results = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What so many processes have found, by case; they run once."""
    if not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    engine, model = start()
    train(engine, model, range(3))
    torch.save(engine.state(), folder / "torch.pt")
    code = f"import pathlib, test_engine; test_engine.deepspeed_side(pathlib.Path({str(folder)!r}))"

    @cache
    def of(processes: int) -> dict[str, Any]:
        run_processes(processes, code)
        found: dict[str, Any] = torch.load(folder / f"{processes}.pt", weights_only=True)
        return found

    return of


def run_processes(number: int, code: str) -> None:
    """Run ``code`` in ``number`` processes of one world; two of them as torchrun would."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(number):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": number,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in place.items()} if number > 1 else {}
        # Threads that DeepSpeed's process groups leave behind abort the interpreter's own exit now and then.
        ending = f"{code}\nimport os\nos._exit(0)"
        command = [sys.executable, "-W", "ignore::FutureWarning", "-c", ending]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    errors = [process.communicate()[1].decode() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(error[-3000:] for error in errors)


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


@every_run
def test_deepspeed_does_what_torch_does(results: Results, processes: int, case: str) -> None:
    engine, model = start()
    seen = train(engine, model, range(3))
    fresh = results(processes)[case]["fresh"]
    assert min(norm for _, norm in seen) > 0.5, "clipping has something to do"
    assert_same_run(fresh, seen, engine.state())
    assert torch.equal(fresh["weights"]["frozen"], model.frozen)
    for name in ("inner", "bias", "outer"):
        assert torch.equal(fresh["weights"][name], fresh["state"][name]["value"])
    for name, value in fresh["weights"].items():
        assert value.shape == model.get_parameter(name).shape
    assert any(fresh["between"]) == (case not in ("3", "3 offloaded")), "ZeRO-3 keeps no weight whole, frozen or not"


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_skips_without_a_trace(results: Results, case: str) -> None:
    found = results(1)[case]
    skipped, clean = found["skipped"], found["clean"]
    assert not any(math.isfinite(skipped["seen"][update][1]) for update in BROKEN)
    assert [skipped["seen"][update] for update in (1, 4)] == clean["seen"]
    assert_same_state(skipped["state"], clean["state"], atol=0)
    assert_same_state(found["first"], start()[0].state(), atol=0)
    assert float(clean["state"]["inner"]["step"]) == float(skipped["state"]["inner"]["step"]) == 2


@every_run
def test_deepspeed_continues_what_torch_began(results: Results, processes: int, case: str) -> None:
    engine, model = start()
    train(engine, model, range(3))
    assert_same_state(results(processes)[case]["loaded"]["state"], engine.state(), atol=0)
    seen = train(engine, model, range(3, 5))
    assert_same_run(results(processes)[case]["continued"], seen, engine.state())


@every_run
def test_torch_continues_what_deepspeed_began(results: Results, processes: int, case: str) -> None:
    engine, model = start()
    train(engine, model, range(3))
    expected = train(engine, model, range(3, 5))
    continued, other = start(state=results(processes)[case]["fresh"]["state"])
    seen = train(continued, other, range(3, 5))
    assert_same_run({"seen": seen, "state": continued.state()}, expected, engine.state())


def distill_side(folder: Path) -> None:
    """Distil the tiny student with torch and with ZeRO-3, in two processes."""
    torch.set_num_threads(1)
    world, _ = join("cpu")
    if world.is_first:
        (folder / "stage.json").write_text(json.dumps([part.model_dump(mode="json") for part in make_stage(folder)]))
    world.wait()
    stage = Stage(
        *(kind(**part) for kind, part in zip(KINDS, json.loads((folder / "stage.json").read_text()), strict=True))
    )
    for name, changes in VARIANTS.items():
        for engine in ("torch", "deepspeed"):
            recipe = stage.but(engine=engine, deepspeed={"zero_stage": 3}, max_updates=3, **changes)
            kept = Kept()
            made = stage.run(folder / f"{name} {engine}", kept, recipe)
            if world.is_first:
                (folder / f"{name} {engine}.json").write_text(json.dumps([made.uri, kept.seen]))
    world.leave()


KINDS = (Recipe, Checkpoint, Checkpoint, DataManifest, TargetStore)
VARIANTS: Mapping[str, dict[str, Any]] = {
    "paper": {},
    "online": {"loss": {"targets": "online"}, "activation_checkpointing": "layers"},
    "student forced": {"loss": {"layer_inputs": "student_forced"}, "activation_checkpointing": "mixers"},
}
"""Gradients taken inside of the loss and layers computed anew are where ZeRO-3's hooks are called out of turn."""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_zero3_trains_the_same_student(tmp_path: Path) -> None:
    run_processes(2, f"import pathlib, test_engine; test_engine.distill_side(pathlib.Path({str(tmp_path)!r}))")
    for name in VARIANTS:
        (ours, seen), (theirs, expected) = (
            json.loads((tmp_path / f"{name} {engine}.json").read_text()) for engine in ("deepspeed", "torch")
        )
        for update, values in expected.items():
            assert seen[update] == pytest.approx(values, rel=1e-4), name
        found, weights = (load_file(Path(uri) / "model.safetensors") for uri in (ours, theirs))
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, atol=2e-5, rtol=0, msg=f"{name}: {key}")  # measured: 2e-6


def test_zero3_needs_all_that_is_trained_and_no_compiler() -> None:
    model = Model()
    with pytest.raises(ValueError, match="4 trained parameters are in none of the modules"):
        Zero3Engine(model.trained(), settings(case="3"), "cpu", ALONE, [])
    compiled = settings(case="3").model_copy(update={"compile": True})
    with pytest.raises(ValueError, match=r"distill\.compile .* distill\.deepspeed\.zero_stage 3"):
        Zero3Engine(model.trained(), compiled, "cpu", ALONE, [model])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters needs zero_stage: 3"),
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer needs zero_stage: 1, 2 or 3"),
    ],
)
def test_offloading_what_is_not_shared_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DeepSpeed.model_validate(wrong)
