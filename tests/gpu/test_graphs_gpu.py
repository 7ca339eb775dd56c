"""A run with CUDA graphs is the run without: recorded and replayed on a real GPU, with both kernels.

python -m pytest tests/gpu/test_graphs_gpu.py -s
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distill import Kept, Stage, make_stage

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

FAR = 2e-3
"""Relative; kernels that add in any order move the curve of a plain run by as much from one try to the next."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kernels", ["torch", "mamba_ssm"])
@pytest.mark.parametrize("layer_inputs", ["teacher_forced", "student_forced"])
def test_the_curve_is_the_same(stage: Stage, tmp_path: Path, layer_inputs: str, kernels: str, compiled: bool) -> None:
    curves = []
    for graphs in (False, True):
        fields: dict[str, Any] = {"cuda_graphs": graphs, "micro_batch_size": 1, "activation_checkpointing": "mixers"}
        recipe = stage.but(loss={"layer_inputs": layer_inputs}, compile=compiled, **fields).model_dump()
        recipe["hybrid"]["kernels"] = kernels
        kept = Kept()
        given = stage._asdict() | {"recipe": type(stage.recipe).model_validate(recipe)}
        from matvlm.distill import distill

        distill(**given, folder=tmp_path / str(graphs), reporter=kept, device="cuda")
        curves.append(kept.seen)
    plain, replayed = curves
    assert len(plain) >= 5
    worst = max(
        abs(replayed[update][name] - value) / abs(value) for update, row in plain.items() for name, value in row.items()
    )
    print(f"{layer_inputs}, {kernels}, compile {compiled}: {worst:.1e}")
    assert worst < FAR
