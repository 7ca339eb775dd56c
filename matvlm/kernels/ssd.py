"""State-space duality (SSD): Mamba-2's selective scan, one scalar decay per head (Dao and Gu, arXiv 2405.21060).

    h[t] = exp(dt[t] * A) * h[t-1] + s[t] * x[t] B[t]^T          y[t] = h[t] C[t] + D * x[t]

with ``s = dt``, or ``s = 1`` where the caller wants the decay not to rescale the input. Shapes: B batch, L tokens, H
heads, P head width, G groups of heads that share B or C (H is a multiple of G), N state width; in the code also n
chunks of Q tokens. Everything inside is float32, whatever the inputs are and whatever autocast says.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from matvlm.kernels import load_function, resolve_backend


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

    Returns:
        y [B, L, H, P] in x's dtype and the final state [B, H, P, N] in float32.
    """
    if resolve_backend(backend, x.device) == "mamba_ssm":
        return _scan_mamba_ssm(x, dt, A, B, C, D, initial_state, chunk_size, scale_input)
    with torch.autocast(x.device.type, enabled=False):
        return _scan_torch(x, dt, A, B, C, D, initial_state, chunk_size, scale_input)


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor, scale_input: bool = True
) -> tuple[Tensor, Tensor]:
    """One token of ``ssd_scan``: x [B, H, P], dt [B, H], B and C [B, G, N], state [B, H, P, N].

    Returns:
        y [B, H, P] in x's dtype and the new state in float32; ``state`` itself is not changed.
    """
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


def _spread(grouped: Tensor, heads: int) -> Tensor:
    """[..., G, N] -> [..., H, N]: each group serves H / G neighbouring heads."""
    groups = grouped.shape[-2]
    return grouped if groups == heads else grouped.repeat_interleave(heads // groups, dim=-2)


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

    to_end = torch.exp(log_decay[..., -1:] - log_decay)
    added = torch.matmul(values.transpose(-1, -2), keys * to_end[..., None])  # [B, H, n, P, N]
    whole = torch.exp(log_decay[..., -1])[..., None, None]
    entering, state = _states_between(added, whole, initial_state)

    y: Tensor = _WithinChunk.apply(values, log_decay, keys, queries)
    if entering is not None:
        skipped = chunks - entering.shape[2]
        carried = torch.matmul(queries[:, :, skipped:], entering.transpose(-1, -2))
        carried = carried * torch.exp(log_decay[:, :, skipped:, :, None])
        y = torch.cat([y[:, :, :skipped], y[:, :, skipped:] + carried], dim=2) if skipped else y + carried
    y = y.movedim(1, 3).reshape(batch, chunks * size, heads, width)[:, :length]
    if D is not None:
        y = y + D.float()[:, None] * x32
    return y.to(x.dtype), state


def _states_between(added: Tensor, whole: Tensor, initial_state: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Carry the state over the chunks.

    Args:
        added: [B, H, n, P, N], what each chunk adds to the state by its end.
        whole: [B, H, n, 1, 1], the decay over each whole chunk.
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
    """``y[q] = sum over s <= q of exp(a[q] - a[s]) * (C[q] . B[s]) * x[s]`` for each chunk on its own.

    By hand because autograd would hold and revisit four Q x Q intermediates where two do, and let each token's own
    term, which does not depend on ``a``, into the gradient of ``a`` twice with opposite signs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x [..., Q, P], a [..., Q] cumulated log decay, B and C [..., Q, N], all float32 -> [..., Q, P]."""
        size = a.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1)
        decay = (a[..., :, None] - a[..., None, :]).masked_fill_(future, float("-inf")).exp_()
        weights = torch.matmul(C, B.transpose(-1, -2)).mul_(decay)
        ctx.save_for_backward(x, B, C, decay, weights)
        return torch.matmul(weights, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, B, C, decay, weights = ctx.saved_tensors
        dx = torch.matmul(weights.transpose(-1, -2), dy)
        dweights = torch.matmul(dy, x.transpose(-1, -2))
        exponents = (dweights * weights).tril_(-1)
        da = exponents.sum(-1) - exponents.sum(-2)
        dscores = dweights.mul_(decay)
        return dx, da, torch.matmul(dscores.transpose(-1, -2), C), torch.matmul(dscores, B)


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
) -> tuple[Tensor, Tensor]:
    scan = load_function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    dt = dt.float()
    if not scale_input:  # the kernel always multiplies by dt
        skip = None if D is None else D.float()[:, None] * x
        x = (x.float() / dt.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).to(x.dtype)
        y, state = _scan_mamba_ssm(x, dt, A, B, C, None, initial_state, chunk_size, scale_input=True)
        return (y if skip is None else y + skip.to(y.dtype)), state
    groups = max(B.shape[2], C.shape[2])
    y, state = scan(
        x.contiguous(),
        dt,
        A.float(),
        _spread(B, groups).to(x.dtype).contiguous(),
        _spread(C, groups).to(x.dtype).contiguous(),
        # Its chunks must be powers of two, of at least 16 tokens.
        chunk_size=max(16, 1 << (chunk_size - 1).bit_length()),
        D=None if D is None else D.float(),
        initial_states=initial_state,
        return_final_states=True,
    )
    return y, state
