"""What is recorded and replayed is what is computed without; here on a CPU, where a replay computes it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_distill import Kept, Stage, make_stage
from torch import Tensor, nn

from matvlm.distill.graphs import STEP, Graphs, rounded

NEAR = {"rel": 2e-5, "abs": 1e-7}
"""Measured: at most 3e-6 relative after six updates, as sums over 64 positions are taken in another order."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("graphs"))


def curve(stage: Stage, folder: Path, **fields: Any) -> dict[int, dict[str, float]]:
    kept = Kept()
    stage.run(folder, kept, stage.but(**fields))
    return kept.seen


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"micro_batch_size": 1, "activation_checkpointing": "mixers"},
        {"loss": {"layer_inputs": "student_forced"}},
        {"loss": {"layer_inputs": "student_forced", "prob": 0.0, "ce": 0.0}},
        {"loss": {"targets": "online", "logits_l2": 0.1}, "train_connector": False},
        {"loss": {"prob": {"from": 1.0, "to": 0.5, "updates": 3}}, "align": {"updates": 2}},
    ],
)
def test_a_run_with_graphs_is_the_same(stage: Stage, tmp_path: Path, fields: dict[str, Any]) -> None:
    plain, replayed = (curve(stage, tmp_path / str(on), cuda_graphs=on, **fields) for on in (False, True))
    assert list(plain) == list(replayed)
    assert len(plain) >= 5
    for update, values in plain.items():
        assert replayed[update] == pytest.approx(values, **NEAR)


class Pair(nn.Module):
    """Two functions of a shared weight, and a weight that one of them does not use."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.shared = nn.Parameter(torch.randn(5, 5, generator=generator))
        self.other = nn.Parameter(torch.randn(5, generator=generator))

    def one(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x @ self.shared).tanh(), (x * self.other).sum()

    def two(self, x: Tensor) -> tuple[Tensor, ...]:
        return ((x @ self.shared.T).square(),)


def test_gradients_add_up_over_shapes_and_functions() -> None:
    model, twin = Pair(), Pair()
    graphs = Graphs(model, "cpu")
    generator = torch.Generator().manual_seed(1)
    for name, lengths in (("one", (3, 4)), ("two", (4,)), ("one", (3,))):
        for length in lengths:
            given = torch.randn(2, length, 5, generator=generator)
            ours, theirs = (given.clone().requires_grad_() for _ in range(2))
            sum(out.pow(2).sum() for out in graphs.call(name, getattr(model, name), ours)).backward()
            sum(out.pow(2).sum() for out in getattr(twin, name)(theirs)).backward()
            torch.testing.assert_close(ours.grad, theirs.grad)
    for mine, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)
    assert len(graphs.recorded) == 3
    assert all(grad.data_ptr() != buffer.data_ptr() for grad, buffer in zip(
        (parameter.grad for parameter in model.parameters()), graphs.gradients, strict=True))  # fmt: skip


def test_a_changed_weight_is_seen() -> None:
    model = Pair()
    graphs = Graphs(model, "cpu")
    given = torch.ones(1, 2, 5)
    before, _ = graphs.call("one", model.one, given)
    with torch.no_grad():
        model.shared.mul_(0.5)
    after, _ = graphs.call("one", model.one, given)
    assert torch.equal(before, (given @ (model.shared * 2)).tanh())  # an output outlives the next replay
    assert torch.equal(after, model.one(given)[0])


def test_lengths_are_rounded_up() -> None:
    assert rounded(torch.ones(2, STEP, 3)).shape == (2, STEP, 3)
    longer = rounded(torch.ones(2, STEP + 1, dtype=torch.bool))
    assert longer.shape == (2, 2 * STEP)
    assert longer.sum() == 2 * (STEP + 1)


def test_what_graphs_cannot_follow_is_refused(stage: Stage) -> None:
    for fields in ({"packing": True}, {"deepspeed": {"zero_stage": 3}}):
        with pytest.raises(ValidationError, match="cuda_graphs replay one shape"):
            stage.but(cuda_graphs=True, **fields)
