"""The SSD scan and the causal convolution against sequential float64 recurrences, outputs and every gradient."""

import logging

import pytest
import torch
from torch import Tensor

from matvlm import kernels
from matvlm.kernels.conv import causal_conv1d
from matvlm.kernels.ssd import ssd_scan, ssd_step

# Largest difference from the float64 recurrence over all cases below, relative to the largest value of each tensor:
# 1.4e-6 in outputs and states, 1.2e-5 in gradients (of dt, where cancelling terms leave little). bfloat16 inside the
# scan, or a decay off by one token, gives above 1e-3.
TOLERANCE = 4e-5


def naive_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale_input: bool = True,
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, one token after the other."""
    batch, length, heads, width = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        added = torch.einsum("bhp,bhn->bhpn", x[:, t], B[:, t])
        if scale_input:
            added = added * dt[:, t, :, None, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        y = torch.einsum("bhpn,bhn->bhp", state, C[:, t])
        outputs.append(y if D is None else y + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state


def make_inputs(length: int, groups: int = 4, with_state: bool = False) -> dict[str, Tensor]:
    """float64 inputs for 2 sequences and 4 heads of 8 with states of 6; decays from almost none to almost all."""
    generator = torch.Generator().manual_seed(length)
    batch, heads, width, states = 2, 4, 8, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(batch, length, heads, width),
        "dt": torch.nn.functional.softplus(normal(batch, length, heads) - 1),
        "A": -torch.tensor([0.01, 0.3, 2.0, 16.0], dtype=torch.float64),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, heads, states),
        "D": normal(heads),
    }
    if with_state:
        inputs["initial_state"] = normal(batch, heads, width, states)
    return inputs


def run_with_gradients(function, inputs: dict[str, Tensor], dtype: torch.dtype, **options):
    """Outputs, and the gradient of a fixed random projection of them to every input, all in float64."""
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in inputs.items()}
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    results = {f"output {i}": out for i, out in enumerate(outputs)}
    results |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double() for name, value in results.items()}


def worst_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        assert actual[name].isfinite().all(), name
    return max(
        ((actual[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-9)).item()
        for name in expected
    )


@pytest.mark.parametrize("scale_input", [True, False], ids=["dt", "nodt"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
def test_scan_is_the_recurrence(length, with_state, scale_input):
    inputs = make_inputs(length, with_state=with_state)
    expected = run_with_gradients(naive_scan, inputs, torch.float64, scale_input=scale_input)
    actual = run_with_gradients(ssd_scan, inputs, torch.float32, scale_input=scale_input, chunk_size=64)
    assert worst_difference(actual, expected) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_with_fewer_groups_than_heads(groups):
    inputs = make_inputs(37, groups=groups)
    expected = run_with_gradients(naive_scan, inputs, torch.float64)
    assert worst_difference(run_with_gradients(ssd_scan, inputs, torch.float32, chunk_size=16), expected) < TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_does_not_change_results(chunk_size):
    inputs = make_inputs(65, with_state=True)
    expected = run_with_gradients(naive_scan, inputs, torch.float64)
    actual = run_with_gradients(ssd_scan, inputs, torch.float32, chunk_size=chunk_size)
    assert worst_difference(actual, expected) < TOLERANCE


def test_steps_equal_the_scan():
    inputs = {name: value.float() for name, value in make_inputs(20, groups=2, with_state=True).items()}
    expected, expected_state = ssd_scan(**inputs, chunk_size=8)
    state, outputs = inputs["initial_state"], []
    for t in range(20):
        token = {name: inputs[name][:, t] for name in ("x", "dt", "B", "C")}
        y, state = ssd_step(**token, A=inputs["A"], D=inputs["D"], state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)


def test_strong_decay_stays_finite():
    """exp(-sum of decays) alone would overflow float32 here; the differences within a chunk must not."""
    inputs = make_inputs(128)
    inputs["A"] = torch.full((4,), -1000.0, dtype=torch.float64)
    expected = run_with_gradients(naive_scan, inputs, torch.float64)
    actual = run_with_gradients(ssd_scan, inputs, torch.float32)
    for name in ("gradient of A", "gradient of dt"):  # close to zero: compared on the scale of the outputs instead
        torch.testing.assert_close(actual.pop(name), expected.pop(name), rtol=0, atol=TOLERANCE)
    assert worst_difference(actual, expected) < TOLERANCE


def test_scan_computes_in_float32_under_autocast_and_for_bfloat16():
    inputs = {name: value.float() for name, value in make_inputs(100).items()}
    expected, _ = ssd_scan(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual, state = ssd_scan(**inputs)
    assert torch.equal(actual, expected)
    half = {name: value.bfloat16() for name, value in inputs.items()}
    actual, state = ssd_scan(**half)
    assert actual.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = ssd_scan(**{name: value.float() for name, value in half.items()})
    assert torch.equal(actual, exact.bfloat16())


def naive_conv(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    taps = weight.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.mT
    padded = torch.cat([before, x], dim=1)
    windows = [(padded[:, t : t + taps] * weight.T).sum(1) + bias for t in range(x.shape[1])]
    y = torch.stack(windows, dim=1)
    return (y * torch.sigmoid(y) if silu else y), padded[:, x.shape[1] :].mT


@pytest.mark.parametrize("silu", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 65])
def test_convolution_is_the_sum_over_lags(length, with_state, silu):
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, 10), "weight": (10, 4), "bias": (10,)}
    if with_state:
        shapes["initial_state"] = (2, 10, 3)
    inputs = {n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    expected = run_with_gradients(naive_conv, inputs, torch.float64, silu=silu)
    assert worst_difference(run_with_gradients(causal_conv1d, inputs, torch.float32, silu=silu), expected) < TOLERANCE


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._resolve.cache_clear()
    yield monkeypatch
    kernels._resolve.cache_clear()


def test_backend_follows_argument_then_environment_then_device(fresh_choice, caplog):
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


def test_cuda_without_triton_kernels_warns_once_and_refuses_when_forced(fresh_choice, caplog):
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
