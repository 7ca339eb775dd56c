"""State-space duality (SSD): Mamba-2's selective scan, one scalar decay per head (Dao and Gu, arXiv 2405.21060).

    h[t] = exp(dt[t] * A) * h[t-1] + s[t] * x[t] B[t]^T          y[t] = h[t] C[t] + D * x[t]

with ``s = dt``, or ``s = 1`` where the caller wants the decay not to rescale the input. Shapes: B batch, L tokens, H
heads, P head width, G groups of heads that share B or C (H is a multiple of G), N state width; in the code also n
chunks of Q tokens. In torch everything inside is float32, whatever the inputs are and whatever autocast says (a
``backward`` called inside of autocast is PyTorch's to round, and it does).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from matvlm.kernels import load_function, resolve_backend

LEAST_STEP = 1e-12
"""Added to dt before dividing by it: x / dt**2 stays finite, and no decay nor any dt above 1e-5 changes in float32."""
MOST_BLOCKS, MOST_ELEMENTS = 2**16 - 1, 2**31
"""CUDA's largest second or third grid dimension, and how many elements a signed 32-bit integer can tell apart."""


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
    scale_input: bool = True,
    backend: str = "auto",
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scan a whole sequence; differentiable once in every tensor argument.

    Args:
        x: [B, L, H, P].
        dt: [B, L, H], at least 0 (after softplus); 0 with x = 0 makes a token leave no trace.
        A: [H], negative.
        B, C: [B, L, G, N]; G may differ between the two.
        D: [H], the skip connection.
        initial_state: [B, H, P, N]; None means zeros.
        chunk_size: most tokens per chunk. Work within a chunk is quadratic in it, between chunks it is sequential.
        scale_input: ``s = dt`` (Mamba-2), else ``s = 1``.
        backend: see ``matvlm.kernels.resolve_backend``.
        seq_idx: int32 [B, L], which sample of a packed row each token is of: 0 first and never falling. Every sample
            starts from zeros but the first, whose the ``initial_state`` is; the final state is that of the last.

    Returns:
        y [B, L, H, P] in x's dtype and the final state [B, H, P, N] in float32.
    """
    if resolve_backend(backend, x.device) == "mamba_ssm":
        return _scan_mamba_ssm(x, dt, A, B, C, D, initial_state, chunk_size, scale_input, seq_idx)
    with _without_autocast(x.device.type):
        return _scan_torch(x, dt, A, B, C, D, initial_state, chunk_size, scale_input, seq_idx)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, scale_input: bool = True
) -> tuple[Tensor, Tensor]:
    """One token of ``ssd_scan``: x [B, H, P], dt [B, H], B and C [B, G, N], state [B, H, P, N].

    Returns:
        y [B, H, P] in x's dtype and the new state in float32; ``state`` itself is not changed.
    """
    with _without_autocast(x.device.type):
        heads = x.shape[1]
        x32, dt = x.float(), dt.float()
        scaled = x32 * dt[..., None] if scale_input else x32
        B, C = _spread(B.float(), heads), _spread(C.float(), heads)
        decay = torch.exp(dt * A.float())[..., None, None]
        state = decay * state.float() + scaled[..., None] * B[..., None, :]
        y = torch.matmul(state, C[..., None]).squeeze(-1)
        if D is not None:
            y = y + D.float()[:, None] * x32
        return y.to(x.dtype), state


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off; the ``meta`` device, on which costs are counted, has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _spread(grouped: Tensor, heads: int) -> Tensor:
    """[..., G, N] -> [..., H, N]: each group serves H / G neighbouring heads."""
    groups = grouped.shape[-2]
    return grouped if groups == heads else grouped.repeat_interleave(heads // groups, dim=-2)


@torch.compiler.disable  # its loop over chunks would be compiled anew for every number of them
def _scan_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    scale_input: bool,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = x.shape
    # Equal chunks instead of full ones and a rest: 75 tokens are 2 x 38, not 2 x 64.
    chunks = max(1, -(-length // chunk_size))
    size = max(1, -(-length // chunks))
    padding = chunks * size - length

    def split(tensor: Tensor) -> Tensor:
        """[B, L, H, ...] -> [B, H, n, Q, ...]; padded tokens are zero and so change nothing."""
        if padding:
            tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [0, padding])
        return tensor.unflatten(1, (chunks, size)).movedim(3, 1).contiguous()

    x32, dt = x.float(), dt.float()
    values = split(x32 * dt[..., None] if scale_input else x32)  # [B, H, n, Q, P]
    keys, queries = split(_spread(B.float(), heads)), split(_spread(C.float(), heads))  # [B, H, n, Q, N]
    log_decay = split(dt * A.float()).cumsum(-1)  # [B, H, n, Q], from the chunk's start to and with each token

    to_end, from_start = torch.exp(log_decay[..., -1:] - log_decay), torch.exp(log_decay)
    samples = None
    if seq_idx is not None:
        samples = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, padding)], dim=1).view(batch, 1, chunks, size)
        before = torch.cat([samples[:, :, :1, :1], samples[:, :, :-1, -1:]], dim=2)
        to_end, from_start = to_end * (samples == samples[..., -1:]), from_start * (samples == before)
    added = torch.matmul(values.transpose(-1, -2), keys * to_end[..., None])  # [B, H, n, P, N]
    entering, state = _states_between(added, from_start[..., -1, None, None], initial_state)

    y: Tensor = _WithinChunk.apply(values, log_decay, keys, queries, samples)
    if entering is not None:
        skipped = chunks - entering.shape[2]
        carried = torch.matmul(queries[:, :, skipped:], entering.transpose(-1, -2))
        carried = carried * from_start[:, :, skipped:, :, None]
        y = torch.cat([y[:, :, :skipped], y[:, :, skipped:] + carried], dim=2) if skipped else y + carried
    y = y.movedim(1, 3).reshape(batch, chunks * size, heads, width)[:, :length]
    if D is not None:
        y = y + D.float()[:, None] * x32
    return y.to(x.dtype), state


def _states_between(added: Tensor, whole: Tensor, initial_state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Carry the state over the chunks.

    Args:
        added: [B, H, n, P, N], what each chunk adds to the state by its end.
        whole: [B, H, n, 1, 1], the decay over each whole chunk; 0 where a sample starts in it.
        initial_state: [B, H, P, N] or None.

    Returns:
        The states that enter the chunks [B, H, m, P, N], of the last m = n chunks, or of the last m = n - 1 where the
        first one starts from nothing (None if that leaves no chunk); and the final state [B, H, P, N].
    """
    additions, decays = added.unbind(2), whole.unbind(2)
    entering = []
    state = None if initial_state is None else initial_state.float()
    for addition, decay in zip(additions, decays, strict=True):
        if state is None:
            state = addition
        else:
            entering.append(state)
            state = torch.addcmul(addition, state, decay)
    assert state is not None
    return (torch.stack(entering, dim=2) if entering else None), state


class _WithinChunk(torch.autograd.Function):
    """``y[q] = sum over s <= q of exp(a[q] - a[s]) * (C[q] . B[s]) * x[s]`` for each chunk, s in the sample of q.

    By hand because autograd would hold and revisit four Q x Q intermediates where two do, and let each token's own
    term, which does not depend on ``a``, into the gradient of ``a`` twice with opposite signs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, B: Tensor, C: Tensor, samples: Tensor | None) -> Tensor:
        """x [..., Q, P], a [..., Q] cumulated log decay, B and C [..., Q, N], all float32 -> [..., Q, P].

        ``samples``, integers that broadcast to the shape of a, numbers the samples of packed rows.
        """
        size = a.shape[-1]
        hidden = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)
        if samples is not None:
            hidden = hidden | (samples[..., :, None] != samples[..., None, :])
        decay = (a[..., :, None] - a[..., None, :]).masked_fill_(hidden, float("-inf")).exp_()
        weights = torch.matmul(C, B.transpose(-1, -2)).mul_(decay)
        ctx.save_for_backward(x, B, C, decay, weights)
        return torch.matmul(weights, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        x, B, C, decay, weights = ctx.saved_tensors
        dx = torch.matmul(weights.transpose(-1, -2), dy)
        dweights = torch.matmul(dy, x.transpose(-1, -2))
        exponents = (dweights * weights).tril_(-1)
        da = exponents.sum(-1) - exponents.sum(-2)
        dscores = dweights.mul_(decay)
        return dx, da, torch.matmul(dscores.transpose(-1, -2), C), torch.matmul(dscores, B), None


def _scan_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    scale_input: bool,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` with the Triton kernels: sums in float32, their terms in x's dtype (TF32 for float32)."""
    groups = max(B.shape[2], C.shape[2])
    B, C = _spread(B, groups).to(x.dtype), _spread(C, groups).to(x.dtype)
    if scale_input:
        return _launch(x, dt.float(), A, B, C, D, initial_state, chunk_size, seq_idx)
    # The kernel always multiplies by dt, so divide first. In float32, as in the gradient of dt this division's part and
    # the kernel's cancel: rounding them to bfloat16 leaves noise of 8 % of that gradient where dt is 1 / 256.
    dt = dt.float() + LEAST_STEP
    y, state = _launch(x / dt[..., None], dt, A, B, C, None, initial_state, chunk_size, seq_idx)
    return (y if D is None else y + D.float()[:, None] * x).to(x.dtype), state


@torch.compiler.disable
def _launch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The kernels, on as many sequences at a time as they can address."""
    scan = load_function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    size, rows = launch_shape(x.shape, B.shape, chunk_size)
    pieces = [
        scan(
            x[first : first + rows].contiguous(),
            dt[first : first + rows],
            A.float(),
            B[first : first + rows].contiguous(),
            C[first : first + rows].contiguous(),
            size,
            D=None if D is None else D.float(),
            initial_states=None if initial_state is None else initial_state[first : first + rows].float(),
            seq_idx=None if seq_idx is None else seq_idx[first : first + rows].contiguous(),
            return_final_states=True,
        )
        for first in range(0, x.shape[0], rows)
    ]
    if len(pieces) == 1:
        return pieces[0]
    outputs, states = zip(*pieces, strict=True)
    return torch.cat(outputs), torch.cat(states)


def launch_shape(x: Sequence[int], B: Sequence[int], chunk_size: int) -> tuple[int, int]:
    """Tokens per chunk and sequences per launch for mamba-ssm's kernels.

    Their chunks are powers of two of at least 16 tokens, ``chunks x groups`` and ``sequences x chunks`` are grid
    dimensions, and they compute a sequence's place in each tensor with 32-bit integers, which wrap around silently.

    Args:
        x: the shape [B, L, H, P].
        B: the shape [B, L, G, N].

    Raises:
        ValueError: a single sequence is too long.
    """
    _, length, heads, width = x
    groups, states = B[2:]
    size = max(16, 1 << (chunk_size - 1).bit_length())
    while -(-length // size) * groups > MOST_BLOCKS:
        size *= 2
    chunks = -(-length // size)
    largest = heads * max(length * max(width, states), chunks * width * states, chunks * size * size)
    rows = min(MOST_BLOCKS // chunks, MOST_ELEMENTS // largest)
    if rows < 1:
        raise ValueError(f"{length} tokens are too many for one launch: scan them in parts, by way of initial_state")
    return size, rows
