"""Profiles written by hand, for tests of what is made of them."""

from __future__ import annotations

from matvlm.artifacts import Measurement, Memory, ProfilePoint, ProfileResult, Repeats


def point(
    label: str = "teacher",
    stack: str = "engine",
    prompt: int = 64,
    new_tokens: int = 4,
    batch_size: int = 1,
    *,
    prefill: list[float] | None = None,
    first: list[float] | None = None,
    decode: list[float] | None = None,
    kv: int = 2**20,
    peak: int | None = None,
    setup: float = 0.0,
    step_bytes: int = 1000,
    floor: float = 1000.0,
    out_of_memory: bool = False,
) -> ProfilePoint:
    """Times in seconds, ``decode`` in tokens a second, one value for each repeat; equal ones where none are given."""
    repeats = max((len(values) for values in (prefill, first, decode) if values), default=3)
    prefill, first, decode = prefill or [0.1] * repeats, first or [0.2] * repeats, decode or [50.0] * repeats
    totals = [start + (new_tokens - 1) * batch_size / speed for start, speed in zip(first, decode, strict=True)]
    memory = Memory(weights=2**21, kv=kv, state=2**10, peak_allocated=peak, peak_reserved=peak and peak + 2**20)
    measured = Measurement(
        prefill_seconds=Repeats(each=prefill),
        first_token_seconds=Repeats(each=first),
        decode_tokens_per_second=Repeats(each=decode),
        total_seconds=Repeats(each=totals),
        setup_seconds=setup,
        memory=memory,
    )
    return ProfilePoint(
        label=label,
        stack=stack,
        prompt=prompt,
        new_tokens=new_tokens,
        batch_size=batch_size,
        step_bytes=step_bytes,
        floor_tokens_per_second=floor,
        measured=None if out_of_memory else measured,
    )


def result(*points: ProfilePoint) -> ProfileResult:
    return ProfileResult(points=list(points), machine={"cpu": "Loom 9000", "threads": "1"}, repeats=3, bandwidth=4e10)
