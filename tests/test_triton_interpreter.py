"""mamba-ssm's scan kernels in Triton's interpreter: on a CPU, in float32, against the float64 recurrence.

Set up in a folder of its own (the interpreter needs NumPy below 2.4, and mamba-ssm imports a compiled module that the
Mamba-2 kernels do not use), then run:

    export MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE
    pip install --target interpreter --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
    pip install --target interpreter --no-deps triton==3.6.0 einops==0.8.2 'numpy<2.4'
    touch interpreter/selective_scan_cuda.py
    PYTHONPATH=interpreter TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1 python -m pytest tests/test_triton_interpreter.py

``MAMBA_DETERMINISTIC`` leaves one block size per kernel: choosing between several needs a GPU to time them on. bfloat16
is left to the GPU tests: the interpreter multiplies its bit patterns as if they were integers.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from reference_scan import (
    Case,
    Tensors,
    differences,
    naive_scan,
    of_each_sample,
    packed_rows,
    run_with_gradients,
    scan_inputs,
    with_long_horizons,
)

from matvlm import kernels
from matvlm.kernels import ssd

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or os.environ.get("MAMBA_DETERMINISTIC") != "1",
        reason="runs with TRITON_INTERPRET=1 MAMBA_DETERMINISTIC=1, see the top of the file",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

CASES = [
    Case(1, 16, 3, "state", "full", "dt"),
    Case(17, 16, 3, "fresh", "left", "nodt"),
    Case(33, 40, 1, "state", "right", "nodt"),
    Case(33, 16, 1, "state", "left", "dt"),
]
TOLERANCE = 1e-5
"""Largest difference allowed, relative to each tensor's largest value. Measured: at most 2e-6 (dt,
where the input is not scaled), 5e-7 elsewhere."""


@pytest.fixture(autouse=True)
def cpu_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two things that the kernels' callers ask of CUDA."""
    pytest.importorskip("triton")
    pytest.importorskip("mamba_ssm")
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))


def compare(inputs: Tensors, dtype: torch.dtype, scale: bool) -> dict[str, float]:
    """Differences of the kernels from the recurrence, with x, B and C in ``dtype``."""
    assert kernels.resolve_backend("mamba_ssm", torch.device("cpu")) == "mamba_ssm"
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=scale)
    options = {"scale_input": scale, "chunk_size": 16, "backend": "mamba_ssm"}
    found = differences(run_with_gradients(ssd.ssd_scan, inputs, dict.fromkeys("xBC", dtype), **options), expected)
    print("\n", {name: f"{value:.0e}" for name, value in found.items()})
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_scan_is_the_recurrence(case: Case) -> None:
    found = compare(scan_inputs(case, batch=1), torch.float32, case.scale == "dt")
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize(
    "case", [Case(33, 16, 1, "fresh", "full", "dt"), Case(20, 16, 1, "state", "full", "nodt")], ids=str
)
def test_packed_rows_are_scanned_sample_by_sample(case: Case) -> None:
    rows = packed_rows(case.length)[::5]
    inputs = scan_inputs(case, batch=len(rows))
    options = {"seq_idx": rows, "scale_input": case.scale == "dt"}
    expected = run_with_gradients(partial(of_each_sample, naive_scan), inputs, torch.float64, **options)
    actual = run_with_gradients(ssd.ssd_scan, inputs, torch.float32, **options, chunk_size=16, backend="mamba_ssm")
    found = differences(actual, expected)
    print("\n", {name: f"{value:.0e}" for name, value in found.items()})
    assert max(found.values()) < TOLERANCE, found


def test_sequences_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd, "MOST_ELEMENTS", 2 * 2 * 16 * 16)  # 2 heads, 2 chunks: the states of one sequence
    assert ssd.launch_shape((2, 17, 2, 16), (2, 17, 2, 16), 16) == (16, 1)
    found = compare(scan_inputs(Case(17, 16, 1, "state", "left", "dt"), batch=2), torch.float32, True)
    assert max(found.values()) < TOLERANCE, found


def test_half_precision_inputs_cost_the_gradient_of_dt_nothing() -> None:
    """7e-6; dividing x by dt in float16 instead of float32 would make it 2.5e-2."""
    inputs = with_long_horizons(scan_inputs(Case(48, 16, 1, "fresh", "left", "nodt"), rounded=torch.float16, batch=1))
    found = compare(inputs, torch.float16, False)
    assert found.pop("ddt") < 1e-4
    assert max(found.values()) < 2e-3, found  # float16's own rounding: 4e-4
