"""Which samples of a data set are trained on, and which are kept from that to validate on."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import numpy as np

PART = re.compile(r"\.\d+$")
"""Ends the id of a sample that is a part of a longer conversation."""


def split(dataset: Any, held_out: int) -> tuple[Any, Any]:
    """``dataset`` as what is trained on, and ``held_out`` samples that are not; the same ones for every seed of a run.

    Conversations stay whole: their parts are about one image. So there may be a few held-out samples more.

    Args:
        dataset: of ``open_dataset``.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not held_out:
        return dataset, []
    whole: dict[str, list[int]] = defaultdict(list)
    for row, id in enumerate(dataset["id"]):
        whole[PART.sub("", id)].append(row)
    conversations = list(whole.values())
    chosen: list[int] = []
    for number in np.random.default_rng(0).permutation(len(conversations)):
        if len(chosen) >= held_out:
            break
        chosen += conversations[number]
    if len(chosen) == len(dataset):
        raise ValueError(
            f"distill.validation.samples is {held_out} and there are only {len(dataset)} samples: lower it, some have "
            "to be left to train on"
        )
    rest = np.setdiff1d(np.arange(len(dataset)), chosen)
    return dataset.select(rest), dataset.select(sorted(chosen))
