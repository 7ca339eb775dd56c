"""Which samples of a data set are trained on, and which are kept from that to validate on."""

from __future__ import annotations

from typing import Any

import numpy as np


def split(dataset: Any, held_out: int) -> tuple[Any, Any]:
    """``dataset`` as (what is trained on, ``held_out`` samples that are not); the same ones for every seed of a run.

    Args:
        dataset: of ``open_dataset``.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not held_out:
        return dataset, []
    if held_out >= len(dataset):
        raise ValueError(
            f"distill.validation.samples is {held_out} and there are only {len(dataset)} samples: lower it, some have "
            "to be left to train on"
        )
    shuffled = np.random.default_rng(0).permutation(len(dataset))
    return dataset.select(np.sort(shuffled[held_out:])), dataset.select(np.sort(shuffled[:held_out]))
