"""Which decoder layers become Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Sequence

RULES = ("even", "paper", "first", "middle", "last")
SENSITIVITY = "sensitivity"
"""The rule that needs a measurement: see ``matvlm.sensitivity`` and ``least_sensitive``."""


def choose_layers(num_layers: int, ratio: float, rule: str | Sequence[int] = "even") -> list[int]:
    """The layer numbers to replace, ascending.

    Args:
        num_layers: decoder layers of the model.
        ratio: share to replace; rounded to whole layers. Ignored where ``rule`` lists the layers.
        rule: ``even``: spread evenly, starting with layer 0 (25 % of 32: 0, 4, ..., 28). ``paper``: as released with
            arXiv 2503.13440, which is the same but for 12.5 % of 32, 0, 6, 12, 18. ``first``, ``middle``, ``last``: one
            block at that place. Or the layers themselves.

    Raises:
        ValueError: an unknown rule, one that needs a measurement, a layer out of range or named twice, or none or all
            would be replaced.
    """
    if isinstance(rule, str):
        return _by_rule(num_layers, ratio, rule)
    layers = sorted(rule)
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers {list(rule)} names a layer twice")
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"layers {wrong} do not exist: the model has layers 0 to {num_layers - 1}")
    _check_count(len(layers), num_layers, f"layers {list(rule)}")
    return layers


def least_sensitive(scores: Sequence[float], ratio: float) -> list[int]:
    """The layers with the lowest of ``scores``, one a decoder layer, ascending; of equal ones the lower layer.

    Raises:
        ValueError: a score is not a number, or none or all layers would be replaced.
    """
    unknown = [layer for layer, score in enumerate(scores) if math.isnan(score)]
    if unknown:
        raise ValueError(f"the sensitivity of layers {unknown} is NaN: the model or its mixers are broken there")
    count = _count(len(scores), ratio)
    return sorted(sorted(range(len(scores)), key=lambda layer: (scores[layer], layer))[:count])


def check_choice(num_layers: int, ratio: float, rule: str | Sequence[int]) -> None:
    """Refuse what ``choose_layers`` or ``least_sensitive`` will refuse, before anything is measured.

    Raises:
        ValueError: as those do.
    """
    num_replaced(num_layers, ratio, rule)


def num_replaced(num_layers: int, ratio: float, rule: str | Sequence[int]) -> int:
    """How many layers ``choose_layers`` or ``least_sensitive`` will choose.

    Raises:
        ValueError: as those do.
    """
    return _count(num_layers, ratio) if rule == SENSITIVITY else len(choose_layers(num_layers, ratio, rule))


def _by_rule(num_layers: int, ratio: float, rule: str) -> list[int]:
    if rule == SENSITIVITY:
        raise ValueError(
            "layers: sensitivity is measured on the model and its data: run init_hybrid, or give the layers as a list"
        )
    if rule not in RULES:
        raise ValueError(f"layers: rule {rule!r} is not one of {', '.join((*RULES, SENSITIVITY))}")
    count = _count(num_layers, ratio)
    if rule == "paper" and (num_layers, count) == (32, 4):
        return [0, 6, 12, 18]
    if rule in ("even", "paper"):
        return [index * num_layers // count for index in range(count)]
    start = {"first": 0, "middle": (num_layers - count) // 2, "last": num_layers - count}[rule]
    return list(range(start, start + count))


def _count(num_layers: int, ratio: float) -> int:
    count = round(num_layers * ratio)
    _check_count(count, num_layers, f"ratio {ratio:g}")
    return count


def _check_count(count: int, num_layers: int, what: str) -> None:
    if count <= 0:
        raise ValueError(f"{what} replaces none of the {num_layers} layers: at least one has to become Mamba-2")
    if count >= num_layers:
        raise ValueError(f"{what} replaces all {num_layers} layers: at least one has to stay attention")
