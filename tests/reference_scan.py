"""The scan and the convolution as sequential float64 recurrences, their inputs, and how far a kernel is from them.

Needs torch only, so that the GPU tests can use it on a machine with little else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """One kind of input of the scan. Heads are ``dim`` x ``dim``; ``repeats`` of them share x and B."""

    length: int
    dim: int
    repeats: int
    state: str
    padding: str
    scale: str

    def __str__(self) -> str:
        return "-".join(str(value) for value in self)


LEVELS = {
    "length": (1, 63, 64, 65, 500, 2049),
    "dim": (32, 64, 80, 128),
    "repeats": (1, 3, 4),
    "state": ("fresh", "state"),
    "padding": ("full", "left", "right"),
    "scale": ("dt", "nodt"),
}
"""What each part of a case may be. Padding has dt = 0 and x = 0; "nodt" leaves the input unscaled by dt."""

CASES = [
    Case(1, 32, 3, "state", "full", "dt"),
    Case(1, 64, 1, "state", "full", "nodt"),
    Case(1, 80, 1, "fresh", "right", "dt"),
    Case(1, 128, 4, "fresh", "left", "nodt"),
    Case(63, 32, 1, "fresh", "right", "nodt"),
    Case(63, 64, 4, "state", "left", "dt"),
    Case(63, 80, 3, "fresh", "full", "nodt"),
    Case(63, 128, 1, "state", "right", "dt"),
    Case(64, 32, 4, "fresh", "right", "nodt"),
    Case(64, 64, 3, "fresh", "left", "dt"),
    Case(64, 80, 1, "state", "right", "nodt"),
    Case(64, 128, 1, "state", "full", "nodt"),
    Case(65, 32, 1, "fresh", "left", "dt"),
    Case(65, 64, 4, "state", "left", "nodt"),
    Case(65, 80, 4, "state", "full", "nodt"),
    Case(65, 128, 3, "state", "right", "nodt"),
    Case(500, 32, 4, "fresh", "right", "nodt"),
    Case(500, 64, 3, "state", "left", "nodt"),
    Case(500, 80, 1, "fresh", "left", "nodt"),
    Case(500, 128, 1, "state", "full", "dt"),
    Case(2049, 32, 4, "fresh", "full", "nodt"),
    Case(2049, 64, 3, "fresh", "right", "dt"),
    Case(2049, 80, 1, "state", "left", "nodt"),
    Case(2049, 128, 1, "state", "left", "dt"),
]
"""Any two values of different parts occur together; every length with every head dimension."""


def uncovered_pairs() -> set[tuple[object, ...]]:
    """The pairs of values that no case has together."""

    def pairs(row: tuple[object, ...]) -> set[tuple[object, ...]]:
        return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}

    wanted = set[tuple[object, ...]]().union(*(pairs(row) for row in product(*LEVELS.values())))
    return wanted.difference(*(pairs(case) for case in CASES))


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
    """``matvlm.kernels.ssd.ssd_scan`` as it is written, one token after the other."""
    batch, _, heads, width = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    state = x.new_zeros(batch, heads, width, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        scaled = x_t * dt_t[..., None] if scale_input else x_t
        state = torch.exp(dt_t * A)[..., None, None] * state + scaled[..., None] * B_t[:, :, None]
        y = torch.matmul(state, C_t[..., None]).squeeze(-1)
        outputs.append(y if D is None else y + D[:, None] * x_t)
    return torch.stack(outputs, dim=1), state


def naive_conv(
    x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """``matvlm.kernels.conv.causal_conv1d``, one token after the other."""
    taps = weight.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if initial_state is None else initial_state.mT
    padded = torch.cat([before, x], dim=1)
    y = torch.stack([(padded[:, t : t + taps] * weight.T).sum(1) + bias for t in range(x.shape[1])], dim=1)
    return (y * torch.sigmoid(y) if silu else y), padded[:, x.shape[1] :].mT


def of_each_sample(
    function: Callable[..., tuple[Tensor, Tensor]],
    *,
    seq_idx: Tensor,
    initial_state: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """What ``naive_scan`` or ``naive_conv`` gives for each sample of packed rows on its own, and the last one's state.

    ``seq_idx`` [B, L] numbers the samples of each row; a row's first sample starts from ``initial_state``.
    """
    sequences = {name: inputs.pop(name) for name in ("x", "dt", "B", "C") if name in inputs}
    outputs, states = [], []
    for row, numbers in enumerate(seq_idx):
        sizes = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        pieces = zip(*(value[row : row + 1].split(sizes, dim=1) for value in sequences.values()), strict=True)
        state = None if initial_state is None else initial_state[row : row + 1]
        found = []
        for piece in pieces:
            y, last = function(**dict(zip(sequences, piece, strict=True)), **inputs, initial_state=state)
            found.append(y)
            state = None
        outputs.append(torch.cat(found, dim=1))
        states.append(last)
    return torch.cat(outputs), torch.cat(states)


def packed_rows(length: int, device: str = "cpu") -> Tensor:
    """``seq_idx`` int32 [B, L]: rows with a new sample at any one token, at two, at every one, and at none."""
    starts = [[token] for token in range(1, length)]
    starts += [[token, token + 1] for token in range(1, length - 1, 3)]
    starts += [list(range(1, length)), []]
    rows = torch.zeros(len(starts), length, dtype=torch.int32)
    for row, tokens in enumerate(starts):
        rows[row, tokens] = 1
    return rows.cumsum(1, dtype=torch.int32).to(device)


def scan_inputs(
    case: Case, device: str = "cpu", rounded: torch.dtype = torch.float32, batch: int | None = None
) -> Tensors:
    """float64 inputs with the values of ``rounded`` in x, B, C and of float32 in the rest.

    Decays run from almost none to almost all over the heads. As in the mixer, x and B come with KV heads: x is repeated
    to all heads, B is not. Short cases have two KV heads and two sequences, with padding of different lengths.
    """
    generator = torch.Generator().manual_seed(case.length)
    kv_heads = 2 if case.length <= 65 else 1
    heads, batch = kv_heads * case.repeats, batch or (2 if case.length <= 500 else 1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).double()

    inputs = {
        "x": normal(batch, case.length, kv_heads, case.dim, dtype=rounded).repeat_interleave(case.repeats, dim=2),
        "dt": F.softplus(normal(batch, case.length, heads) - 1).float().double(),
        "A": -torch.logspace(-2, 1.2, heads).double(),
        "B": normal(batch, case.length, kv_heads, case.dim, dtype=rounded),
        "C": normal(batch, case.length, heads, case.dim, dtype=rounded),
        "D": normal(heads),
    }
    if case.state == "state":
        inputs["initial_state"] = normal(batch, heads, case.dim, case.dim)
    if case.padding != "full":
        for row in range(batch):
            pads = -(-case.length // (3 + row))
            silent = slice(0, pads) if case.padding == "left" else slice(case.length - pads, case.length)
            inputs["x"][row, silent] = inputs["dt"][row, silent] = 0.0
    return {name: value.to(device) for name, value in inputs.items()}


def with_long_horizons(inputs: Tensors) -> Tensors:
    """The same inputs with the decays of a slow head of the ``aligned`` start: A = -1, dt about 1 / 256."""
    dt = torch.where(inputs["dt"] > 0, torch.exp(inputs["dt"] - 0.3).float().double() / 256, 0.0)
    return inputs | {"dt": dt, "A": -torch.ones_like(inputs["A"])}


def conv_inputs(
    length: int, channels: int, with_state: bool, device: str = "cpu", rounded: torch.dtype = torch.float32
) -> Tensors:
    """float64 inputs of the convolution for two sequences and four taps, with the values of ``rounded``."""
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, channels), "weight": (channels, 4), "bias": (channels,)}
    if with_state:
        shapes["initial_state"] = (2, channels, 3)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).to(rounded).double().to(device)
        for name, shape in shapes.items()
    }


def run_with_gradients(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: Tensors,
    dtype: torch.dtype | dict[str, torch.dtype],
    **options: object,
) -> Tensors:
    """Outputs, and the gradient of a fixed random projection of them to every input, all in float64.

    ``dtype`` is that of the inputs: one for all, or by name with the rest in float32. The projection is the same for
    every dtype: its values are bfloat16's.
    """
    dtypes = dtype if isinstance(dtype, dict) else dict.fromkeys(inputs, dtype)
    leaves = {
        name: value.to(dtypes.get(name, torch.float32), copy=True).requires_grad_() for name, value in inputs.items()
    }
    outputs = function(**leaves, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(out.shape, generator=generator).bfloat16().to(out) for out in outputs]
    torch.autograd.backward(list(outputs), weights)
    results = dict(zip(("y", "state"), outputs, strict=True))
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        results[f"d{name}"] = leaf.grad
    return {name: value.detach().double() for name, value in results.items()}


def differences(actual: Tensors, expected: Tensors) -> dict[str, float]:
    """The largest difference in each tensor, relative to the tensor's largest value."""
    assert actual.keys() == expected.keys()
    found = {}
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        assert actual[name].isfinite().all(), name
        found[name] = ((actual[name] - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)).item()
    return found
