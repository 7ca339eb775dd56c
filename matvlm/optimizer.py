"""The optimiser of mixers and connector (arXiv 2503.13440)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from matvlm.config import Optimizer


def adamw(parameters: Iterable[nn.Parameter], settings: Optimizer, fused: bool | None = None) -> torch.optim.AdamW:
    """torch's AdamW with weight decay on matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused)
