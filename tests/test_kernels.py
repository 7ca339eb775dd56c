"""The SSD scan and the causal convolution against sequential float64 recurrences, outputs and every gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from reference_scan import (
    CASES,
    LEVELS,
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
    uncovered_pairs,
)

from matvlm import kernels
from matvlm.kernels import ssd
from matvlm.kernels.conv import causal_conv1d
from matvlm.kernels.ssd import ssd_scan, ssd_step

# Largest difference from the float64 recurrence over all cases below, relative to the largest value of each tensor:
# 2.4e-6 in outputs, 8e-7 in states, 1.7e-5 in the gradients of dt and A, where cancelling terms leave little, 2.4e-6 in
# the others. bfloat16 inside the scan, or a decay off by one token, gives above 1e-3.
TOLERANCE = {"ddt": 4e-5, "dA": 4e-5}
OTHERS = 1e-5


def check(actual: Tensors, expected: Tensors) -> None:
    found = differences(actual, expected)
    assert all(found[name] < TOLERANCE.get(name, OTHERS) for name in found), found


def compare_scan(case: Case, chunk_size: int = 64) -> None:
    inputs, scale = scan_inputs(case), case.scale == "dt"
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=scale)
    check(run_with_gradients(ssd_scan, inputs, torch.float32, scale_input=scale, chunk_size=chunk_size), expected)


def test_cases_cover_every_pair() -> None:
    assert uncovered_pairs() == set()
    assert {(case.length, case.dim) for case in CASES} == {(a, b) for a in LEVELS["length"] for b in LEVELS["dim"]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_is_the_recurrence(case: Case) -> None:
    compare_scan(case)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_does_not_change_results(chunk_size: int) -> None:
    compare_scan(Case(65, 32, 3, "state", "left", "dt"), chunk_size)


def test_scan_where_states_are_wider_than_heads() -> None:
    inputs = scan_inputs(Case(65, 32, 3, "state", "left", "dt"))
    for name in ("B", "C", "initial_state"):
        inputs[name] = torch.cat([inputs[name], inputs[name].flip(-1)[..., :9]], dim=-1)
    expected = run_with_gradients(naive_scan, inputs, torch.float64)
    check(run_with_gradients(ssd_scan, inputs, torch.float32), expected)


@pytest.mark.parametrize("scale_input", [True, False], ids=["dt", "nodt"])
def test_steps_equal_the_scan(scale_input: bool) -> None:
    inputs = {name: value.float() for name, value in scan_inputs(Case(20, 32, 3, "state", "left", "dt")).items()}
    expected, expected_state = ssd_scan(**inputs, chunk_size=8, scale_input=scale_input)
    state, outputs = inputs["initial_state"], []
    for t in range(20):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        y, state = ssd_step(**token, A=inputs["A"], D=inputs["D"], state=state, scale_input=scale_input)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=2e-5)


def test_strong_decay_stays_finite() -> None:
    """exp(-sum of decays) alone would overflow float32 here; the differences within a chunk must not."""
    inputs = scan_inputs(Case(130, 32, 4, "state", "full", "dt"))
    inputs["A"] = torch.full_like(inputs["A"], -1000.0)
    inputs["dt"] = inputs["dt"].clamp(min=0.05)
    expected = run_with_gradients(naive_scan, inputs, torch.float64)
    actual = run_with_gradients(ssd_scan, inputs, torch.float32)
    for name in ("dA", "dinitial_state"):  # exp(-50) and less: compared on the scale of the outputs instead
        torch.testing.assert_close(actual.pop(name), expected.pop(name), rtol=0, atol=4e-5)
    check(actual, expected)


def test_scan_and_step_compute_in_float32_under_autocast_and_for_bfloat16() -> None:
    inputs = {name: value.float() for name, value in scan_inputs(Case(100, 32, 1, "state", "full", "dt")).items()}
    token = {name: inputs[name][:, 0] for name in ("x", "dt", "B", "C")}
    token |= {"A": inputs["A"], "D": inputs["D"], "state": inputs["initial_state"]}
    expected = [*ssd_scan(**inputs), *ssd_step(**token)]
    with torch.autocast("cpu", torch.bfloat16):
        actual = [*ssd_scan(**inputs), *ssd_step(**token)]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)

    half = {name: value.bfloat16() for name, value in inputs.items()}
    y, state = ssd_scan(**half)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = ssd_scan(**{name: value.float() for name, value in half.items()})
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 65])
def test_convolution_is_the_sum_over_lags(length: int, with_state: bool, silu: bool) -> None:
    inputs = conv_inputs(length, 10, with_state)
    expected = run_with_gradients(naive_conv, inputs, torch.float64, silu=silu)
    check(run_with_gradients(causal_conv1d, inputs, torch.float32, silu=silu), expected)


@pytest.mark.parametrize("scale_input", [True, False], ids=["dt", "nodt"])
@pytest.mark.parametrize("state", ["fresh", "state"])
@pytest.mark.parametrize("length", [16, 22])
def test_packed_rows_are_scanned_sample_by_sample(length: int, state: str, scale_input: bool) -> None:
    """A sample starts at every place in a chunk of 8, the last of which is not full with 22 tokens."""
    seq_idx = packed_rows(length)
    inputs = scan_inputs(Case(length, 8, 3, state, "full", "dt"), batch=len(seq_idx))
    options = {"seq_idx": seq_idx, "scale_input": scale_input}
    expected = run_with_gradients(partial(of_each_sample, naive_scan), inputs, torch.float64, **options)
    check(run_with_gradients(ssd_scan, inputs, torch.float32, **options, chunk_size=8), expected)
    together = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=scale_input)
    leaks = differences(together, expected)
    assert leaks.pop("dD") < 1e-12
    assert min(leaks.values()) > 1e-2, "else nothing is tested"


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_packed_rows_in_chunks_of_any_size(chunk_size: int) -> None:
    seq_idx = packed_rows(15)
    inputs = scan_inputs(Case(15, 8, 1, "fresh", "full", "dt"), batch=len(seq_idx))
    expected = run_with_gradients(partial(of_each_sample, naive_scan), inputs, torch.float64, seq_idx=seq_idx)
    actual = run_with_gradients(ssd_scan, inputs, torch.float32, seq_idx=seq_idx, chunk_size=chunk_size)
    check(actual, expected)


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [1, 2, 4, 11])
def test_packed_rows_are_convolved_sample_by_sample(length: int, with_state: bool, silu: bool) -> None:
    seq_idx = packed_rows(length)
    inputs = conv_inputs(length, 10, with_state)
    for name in {"x", "initial_state"} & inputs.keys():
        inputs[name] = inputs[name].repeat(-(-len(seq_idx) // 2), 1, 1)[: len(seq_idx)]
    expected = run_with_gradients(
        partial(of_each_sample, naive_conv), inputs, torch.float64, seq_idx=seq_idx, silu=silu
    )
    check(run_with_gradients(causal_conv1d, inputs, torch.float32, seq_idx=seq_idx, silu=silu), expected)


def test_one_sample_a_row_needs_no_numbers() -> None:
    """Bit by bit: what packing costs is a choice of kernel, not of result."""
    inputs = {name: value.float() for name, value in scan_inputs(Case(65, 32, 3, "state", "left", "dt")).items()}
    numbers = torch.zeros(2, 65, dtype=torch.int32)
    assert all(map(torch.equal, ssd_scan(**inputs, seq_idx=numbers), ssd_scan(**inputs)))
    inputs = {name: value.float() for name, value in conv_inputs(65, 10, True).items()}
    assert all(map(torch.equal, causal_conv1d(**inputs, seq_idx=numbers), causal_conv1d(**inputs)))


@pytest.mark.parametrize(
    ("x", "groups", "chunk_size", "expected"),
    [
        ((4, 900, 32, 80), 32, 64, (64, 2**31 // (15 * 32 * 80 * 80))),  # 15 states a sequence are its largest tensor
        ((4, 1, 8, 16), 8, 1, (16, 65535)),  # their smallest chunk
        ((4, 900, 32, 80), 32, 100, (128, 512)),  # the next power of two: 8 chunks of 32 x 128 x 128 weights
        ((4, 65536, 32, 80), 32, 256, (256, 4)),  # 2**29 weights a sequence
        ((1, 2**18, 32, 80), 32, 64, (256, 1)),  # 64 tokens a chunk would need 2**17 blocks
    ],
)
def test_triton_launches_stay_within_their_integers(x, groups, chunk_size, expected) -> None:
    assert ssd.launch_shape(x, (*x[:2], groups, x[3]), chunk_size) == expected


def test_a_sequence_too_long_for_triton_is_refused() -> None:
    with pytest.raises(ValueError, match="1048576 tokens are too many for one launch"):
        ssd.launch_shape((1, 2**20, 32, 80), (1, 2**20, 32, 80), 64)


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels._resolve.cache_clear()
    yield monkeypatch
    kernels._resolve.cache_clear()


def test_backend_follows_argument_then_environment_then_device(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpu = torch.device("cpu")
    with caplog.at_level(logging.INFO, logger="matvlm.kernels"):
        assert [kernels.resolve_backend("auto", cpu) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == ["Mamba-2 kernels on cpu: torch"]
    fresh_choice.setenv(kernels.VARIABLE, "mamba_ssm")
    assert kernels.resolve_backend("torch", cpu) == "torch"
    with pytest.raises(RuntimeError, match="MATVLM_KERNELS=mamba_ssm needs CUDA tensors, got cpu"):
        kernels.resolve_backend("auto", cpu)
    fresh_choice.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="MATVLM_KERNELS='fast' is not one of auto, torch, mamba_ssm"):
        kernels.resolve_backend("auto", cpu)


def test_cuda_without_triton_kernels_warns_once_and_refuses_when_forced(
    fresh_choice: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("mamba-ssm is installed")
    cuda = torch.device("cuda")  # a name only: no tensor is made
    assert [kernels.resolve_backend("auto", cuda) for _ in range(3)] == ["torch"] * 3
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    with pytest.raises(RuntimeError, match="cannot be imported"):
        kernels.resolve_backend("mamba_ssm", cuda)
