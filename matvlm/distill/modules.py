"""How training lets a model's modules compute: in which type, and what twice.

Only the way of computing changes, never a weight, so a saved model knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from matvlm.models.patch import forward_as


def cast_(modules: Iterable[nn.Module], device: str, dtype: torch.dtype) -> None:
    """Let ``modules``, whose weights are float32, compute in ``dtype`` by autocast, inside of a model of that type.

    The rest of the model runs as it does in inference. Autocast around all of it would compute its norms in float32
    and keep their inputs so.
    """
    for module in modules:
        vars(module)["forward"] = torch.autocast(device.partition(":")[0], dtype)(module.forward)


@contextmanager
def recomputing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What ``modules`` compute inside is computed anew in the backward pass, from their inputs, and not kept."""

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(forward_as(module, recomputed(module.forward)))
        yield
