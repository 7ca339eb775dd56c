"""What a gain comes from: the stack that runs a model, or the layers that it has."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from matvlm.artifacts import Measurement, ProfilePoint, ProfileResult, Repeats


class Comparison(NamedTuple):
    """The layers' gain: one model against the baseline on the same stack at the same point; above 1 is more of it.

    Speeds are medians of the ratios repeat by repeat; None where one of the two was out of memory.
    """

    label: str
    stack: str
    prompt: int
    new_tokens: int
    batch_size: int
    prefill_speed: float | None
    decode_speed: float | None
    decode_speed_by_bytes: float
    """What the bytes of a decode step let one expect."""
    cache_bytes: float | None
    peak_bytes: float | None

    @property
    def place(self) -> tuple[int, int, int]:
        return self.prompt, self.new_tokens, self.batch_size


class StackGain(NamedTuple):
    """The stack's gain: the engine against whichever of transformers' stacks decoded the same model fastest there."""

    label: str
    prompt: int
    new_tokens: int
    batch_size: int
    best: str | None
    """None: all of them were out of memory, as was the engine where a speed is None beside a ``best``."""
    first_token_speed: float | None
    decode_speed: float | None

    @property
    def place(self) -> tuple[int, int, int]:
        return self.prompt, self.new_tokens, self.batch_size


def compare(result: ProfileResult) -> list[Comparison]:
    """Every other model against the first one, wherever both were measured, in the order of the points."""
    base = {(point.stack, point.place): point for point in result.points if point.label == result.baseline}
    return [
        _comparison(point, base[point.stack, point.place])
        for point in result.points
        if point.label != result.baseline and (point.stack, point.place) in base
    ]


def stack_gains(result: ProfileResult) -> list[StackGain]:
    """Of every point of the engine; none where it or transformers was not measured at all."""
    gains = []
    for point in result.points:
        others = [other for other in result.points if (other.label, other.place) == (point.label, point.place)]
        others = [other for other in others if other.stack != "engine"]
        if point.stack != "engine" or not others:
            continue
        best = max((other for other in others if other.measured), key=_decode_speed, default=None)
        ours, theirs = point.measured, best.measured if best else None
        gains.append(
            StackGain(
                point.label,
                *point.place,
                best.stack if best else None,
                _speed_up(ours, theirs, "first_token_seconds"),
                _speed_up(ours, theirs, "decode_tokens_per_second"),
            )
        )
    return gains


def _comparison(point: ProfilePoint, base: ProfilePoint) -> Comparison:
    ours, theirs = point.measured, base.measured
    cache = peak = None
    if ours and theirs:
        cache = ours.memory.cache / theirs.memory.cache
        if ours.memory.peak_allocated and theirs.memory.peak_allocated:
            peak = ours.memory.peak_allocated / theirs.memory.peak_allocated
    return Comparison(
        label=point.label,
        stack=point.stack,
        prompt=point.prompt,
        new_tokens=point.new_tokens,
        batch_size=point.batch_size,
        prefill_speed=_speed_up(ours, theirs, "prefill_seconds"),
        decode_speed=_speed_up(ours, theirs, "decode_tokens_per_second"),
        decode_speed_by_bytes=base.step_bytes / point.step_bytes,
        cache_bytes=cache,
        peak_bytes=peak,
    )


def _speed_up(ours: Measurement | None, theirs: Measurement | None, name: str) -> float | None:
    """Seconds count the other way round than tokens a second."""
    if ours is None or theirs is None:
        return None
    value: Repeats = getattr(ours, name)
    base: Repeats = getattr(theirs, name)
    above, below = (base, value) if name.endswith("_seconds") else (value, base)
    return statistics.median(a / b for a, b in zip(above.each, below.each, strict=True))


def _decode_speed(point: ProfilePoint) -> float:
    return point.measured.decode_tokens_per_second.median if point.measured else 0.0
