"""Both backends on a CUDA device against the float64 recurrences: outputs, final states and every gradient.

    MAMBA_DETERMINISTIC=1 python -m pytest tests/gpu -s     one block size per Triton kernel: minutes less to compile
    python -m pytest tests/gpu -s -k paper_shape            block sizes tuned, as in a training run
    TRITON_F32_DEFAULT=ieee MAMBA_DETERMINISTIC=1 python -m pytest tests/gpu -s -k float32

The last one has Triton multiply float32 as float32 instead of as TF32, so that only the order of sums differs. Each run
ends with a table of the largest differences.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from reference_scan import (
    Case,
    Tensors,
    conv_inputs,
    differences,
    naive_conv,
    naive_scan,
    of_each_sample,
    packed_rows,
    run_with_gradients,
    scan_inputs,
    with_long_horizons,
)

from matvlm import kernels
from matvlm.kernels.conv import causal_conv1d
from matvlm.kernels.ssd import ssd_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = [
    Case(1, 32, 4, "state", "full", "dt"),
    Case(65, 32, 1, "fresh", "left", "nodt"),
    Case(64, 64, 3, "state", "left", "nodt"),
    Case(500, 64, 1, "fresh", "right", "dt"),
    Case(63, 80, 3, "fresh", "full", "nodt"),
    Case(500, 80, 4, "state", "left", "dt"),
    Case(2049, 80, 1, "state", "right", "nodt"),
    Case(65, 128, 1, "fresh", "right", "nodt"),
    Case(2049, 128, 1, "state", "left", "dt"),
]
PAPER_SHAPES = [(Case(900, 80, 32, "fresh", "left", "nodt"), 64), (Case(900, 80, 32, "fresh", "left", "dt"), 256)]
"""The heads of a Phi-2 layer over an image, a question and an answer, and the tokens per chunk."""

IEEE = os.environ.get("TRITON_F32_DEFAULT") == "ieee"

TOLERANCE = {
    "scan torch float32": 4e-5,
    "scan torch bfloat16": 1e-2,
    "scan mamba_ssm float32": 1e-4 if IEEE else 4e-2,
    "scan mamba_ssm bfloat16": 2e-2,
    "convolution torch float32": 2e-6,
    "convolution torch bfloat16": 2e-2,
    "convolution mamba_ssm float32": 2e-6,
    "convolution mamba_ssm bfloat16": 1e-2,
}
"""Largest difference allowed, relative to the largest value of each tensor.

Measured on an H100 (torch 2.11, triton 3.6, mamba-ssm 2.3.2), in this order: 1.4e-5, 3.6e-3, 5.2e-5 or with TF32 1.8e-2
(in the gradient of A, whose terms cancel; 2e-3 in all else), 8.6e-3, 3.3e-7, 7.7e-3, 3.3e-7, 4.5e-3.
"""

BOTH = pytest.mark.parametrize("backend", ["torch", "mamba_ssm"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
WORST: dict[str, dict[str, tuple[float, str]]] = {}


@pytest.fixture(autouse=True, scope="module")
def table_at_the_end() -> Iterator[None]:
    yield
    if WORST:
        print(f"\n\nLargest differences on {torch.cuda.get_device_name()}, relative to each tensor's largest value")
    for kind, found in sorted(WORST.items()):
        print(f"{kind}, tolerance {TOLERANCE[kind]:.0e}")
        for name, (difference, where) in found.items():
            print(f"    {name:<16}{difference:.1e}  {where}")


def check(kind: str, where: object, actual: Tensors, expected: Tensors) -> None:
    """Note the differences in the table and hold them to the tolerance of ``kind``."""
    found = differences(actual, expected)
    noted = WORST.setdefault(kind, {})
    for name, difference in found.items():
        noted[name] = max(noted.get(name, (0.0, "")), (difference, str(where)))
    assert max(found.values()) < TOLERANCE[kind], found


def needs(backend: str, module: str) -> None:
    if backend == "mamba_ssm":
        pytest.importorskip(module)


def compare_scan(case: Case, backend: str, dtype: torch.dtype, chunk_size: int = 64, batch: int | None = None) -> None:
    needs(backend, "mamba_ssm")
    inputs = scan_inputs(case, "cuda", rounded=dtype, batch=batch)
    scale = case.scale == "dt"
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=scale)
    dtypes = dict.fromkeys("xBC", dtype)
    actual = run_with_gradients(ssd_scan, inputs, dtypes, scale_input=scale, backend=backend, chunk_size=chunk_size)
    check(f"scan {backend} {str(dtype)[6:]}", case, actual, expected)


@DTYPES
@BOTH
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_is_the_recurrence(case: Case, backend: str, dtype: torch.dtype) -> None:
    compare_scan(case, backend, dtype)


@DTYPES
@BOTH
@pytest.mark.parametrize(("case", "chunk_size"), PAPER_SHAPES, ids=str)
def test_scan_of_the_paper_shape(case: Case, chunk_size: int, backend: str, dtype: torch.dtype) -> None:
    compare_scan(case, backend, dtype, chunk_size, batch=2)


@DTYPES
@BOTH
@pytest.mark.parametrize("scale", ["dt", "nodt"])
@pytest.mark.parametrize(("length", "state"), [(40, "fresh"), (33, "state")])
def test_packed_rows_are_scanned_sample_by_sample(
    length: int, state: str, scale: str, backend: str, dtype: torch.dtype
) -> None:
    """A sample starts at every place in a chunk of 16, which is the kernels' smallest."""
    needs(backend, "mamba_ssm")
    case, seq_idx = Case(length, 64, 3, state, "full", scale), packed_rows(length, "cuda")
    inputs = scan_inputs(case, "cuda", rounded=dtype, batch=len(seq_idx))
    options = {"seq_idx": seq_idx, "scale_input": scale == "dt"}
    expected = run_with_gradients(partial(of_each_sample, naive_scan), inputs, torch.float64, **options)
    dtypes = dict.fromkeys("xBC", dtype)
    actual = run_with_gradients(ssd_scan, inputs, dtypes, **options, backend=backend, chunk_size=16)
    check(f"scan {backend} {str(dtype)[6:]}", f"{case} packed", actual, expected)


@pytest.mark.parametrize("scale", ["dt", "nodt"])
def test_scan_with_wide_heads(scale: str) -> None:
    """Gemma's heads: the largest blocks, which may not fit into a multiprocessor's shared memory."""
    compare_scan(Case(130, 256, 1, "state", "full", scale), "mamba_ssm", torch.bfloat16)


def test_scan_takes_the_mixed_dtypes_of_autocast() -> None:
    """There x comes in bfloat16, while rotary may have made B and C float32 and the parameters are float32."""
    pytest.importorskip("mamba_ssm")
    case = Case(130, 80, 4, "state", "left", "nodt")
    inputs = scan_inputs(case, "cuda", rounded=torch.bfloat16)
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=False)
    with torch.autocast("cuda", torch.bfloat16):
        dtypes = {"x": torch.bfloat16}
        actual = run_with_gradients(ssd_scan, inputs, dtypes, scale_input=False, backend="mamba_ssm")
    check("scan mamba_ssm bfloat16", f"{case} autocast", actual, expected)


def test_rounding_to_bfloat16_spares_the_gradient_of_dt() -> None:
    """Dividing x by dt in bfloat16 would leave noise of 8 % of that gradient here."""
    pytest.importorskip("mamba_ssm")
    case = Case(900, 80, 1, "fresh", "left", "nodt")
    inputs = with_long_horizons(scan_inputs(case, "cuda", rounded=torch.bfloat16))
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=False)
    dtypes = dict.fromkeys("xBC", torch.bfloat16)
    actual = run_with_gradients(ssd_scan, inputs, dtypes, scale_input=False, backend="mamba_ssm")
    noise = ((actual["ddt"] - expected["ddt"]).norm() / expected["ddt"].norm()).item()
    print(f"\nnoise in the gradient of dt at long horizons: {noise:.1e}")
    assert noise < 2e-2
    check("scan mamba_ssm bfloat16", f"{case} long horizons", actual, expected)


@pytest.mark.parametrize("scale", [True, False], ids=["dt", "nodt"])
def test_a_vanishing_dt_keeps_everything_finite(scale: bool) -> None:
    """softplus underflows to exactly 0; the token then decays nothing, and without scaling it is still added."""
    pytest.importorskip("mamba_ssm")
    inputs = scan_inputs(Case(65, 80, 1, "state", "full", "nodt"), "cuda", rounded=torch.bfloat16)
    inputs["dt"][:, ::3] = 0.0
    wanted, actual = (
        run_with_gradients(ssd_scan, inputs, dict.fromkeys("xBC", torch.bfloat16), scale_input=scale, backend=backend)
        for backend in ("torch", "mamba_ssm")
    )
    assert actual.pop("ddt").isfinite().all()  # its value there drowns in rounding; softplus then multiplies it by 0
    wanted.pop("ddt")
    check("scan mamba_ssm bfloat16", "dt = 0", actual, wanted)


@DTYPES
@BOTH
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [1, 2, 4, 65, 500])
def test_convolution_is_the_sum_over_lags(
    length: int, with_state: bool, silu: bool, backend: str, dtype: torch.dtype
) -> None:
    needs(backend, "causal_conv1d")
    inputs = conv_inputs(length, 64, with_state, "cuda", rounded=dtype)
    expected = run_with_gradients(naive_conv, inputs, torch.float64, silu=silu)
    dtypes = dict.fromkeys(("x", "initial_state"), dtype)
    actual = run_with_gradients(causal_conv1d, inputs, dtypes, silu=silu, backend=backend)
    check(f"convolution {backend} {str(dtype)[6:]}", f"{length} {with_state} {silu}", actual, expected)


@DTYPES
@BOTH
@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [2, 11, 70])
def test_packed_rows_are_convolved_sample_by_sample(
    length: int, with_state: bool, silu: bool, backend: str, dtype: torch.dtype
) -> None:
    needs(backend, "causal_conv1d")
    seq_idx = packed_rows(length, "cuda")
    inputs = conv_inputs(length, 64, with_state, "cuda", rounded=dtype)
    for name in {"x", "initial_state"} & inputs.keys():
        inputs[name] = inputs[name].repeat(-(-len(seq_idx) // 2), 1, 1)[: len(seq_idx)]
    options = {"seq_idx": seq_idx, "silu": silu}
    expected = run_with_gradients(partial(of_each_sample, naive_conv), inputs, torch.float64, **options)
    dtypes = dict.fromkeys(("x", "initial_state"), dtype)
    actual = run_with_gradients(causal_conv1d, inputs, dtypes, **options, backend=backend)
    check(f"convolution {backend} {str(dtype)[6:]}", f"{length} {with_state} {silu} packed", actual, expected)


@pytest.mark.parametrize(
    ("channels", "taps", "stride"), [(20, 4, 20), (64, 5, 64), (64, 4, 68)], ids=["channels", "taps", "stride"]
)
def test_convolutions_the_fused_kernel_cannot_take(channels: int, taps: int, stride: int) -> None:
    x = torch.randn(1, 1, stride, device="cuda")[..., :channels]
    weight, bias = torch.randn(channels, taps, device="cuda"), torch.randn(channels, device="cuda")
    wanted, _ = naive_conv(x.double(), weight.double(), bias.double())
    needs("mamba_ssm", "mamba_ssm")
    actual, _ = causal_conv1d(x, weight, bias, backend="mamba_ssm")
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


def test_auto_takes_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mamba_ssm")
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert kernels.resolve_backend("auto", torch.device("cuda")) == "mamba_ssm"
    assert kernels.resolve_backend("auto", torch.device("cpu")) == "torch"
