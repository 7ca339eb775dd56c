"""Attention of one token over the filled part of a cache, against softmax written out in float64."""

from __future__ import annotations

import pytest
import torch

from matvlm.kernels.attention import attend, decode_attention

TOLERANCE = 1e-5
"""Measured: 4e-7."""


def written_out(query, keys, values, first, end, scale, window, softcap):
    """The same, sequence by sequence and head by head."""
    rows = []
    for sequence, start in enumerate(first.tolist()):
        if window is not None:
            start = max(start, int(end) + 1 - window)
        seen = slice(start, int(end) + 1)
        groups = query.shape[1] // keys.shape[1]
        heads = []
        for head in range(query.shape[1]):
            k, v = (tensor[sequence, head // groups, seen].double() for tensor in (keys, values))
            scores = k @ query[sequence, head].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ v)
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_only_what_is_seen_counts(kv_heads, window, softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 8, generator=generator)
    keys, values = (torch.randn(2, kv_heads, 20, 8, generator=generator) for _ in range(2))
    first, end = torch.tensor([0, 5]), torch.tensor([11])
    keys[:, :, 12:] = values[:, :, 12:] = float("nan")  # nobody has written there yet
    found = decode_attention(query, keys, values, first, end, 0.3, window, softcap)
    expected = written_out(query, keys, values, first, end, 0.3, window, softcap)
    assert (found - expected).abs().max() < TOLERANCE


def test_a_cap_changes_large_scores_only():
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    plain = attend(query, keys, values, None, 0.5, None)
    assert torch.allclose(attend(query, keys, values, None, 0.5, 1e4), plain, atol=1e-5)
    assert (
        attend(query, keys, values, None, 5.0, 0.5) - attend(query, keys, values, None, 5.0, None)
    ).abs().max() > 0.1
