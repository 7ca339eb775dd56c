"""A profile as tables: the same ones for a terminal, for Markdown and for a card. And every figure as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matvlm.artifacts import Measurement, Memory, ProfilePoint, ProfileResult, Repeats
from matvlm.profiling.gains import compare, stack_gains
from matvlm.profiling.measuring import QUANTITIES

OOM = "OOM"
"""In place of a figure: the memory was not enough."""
NOTABLE_SETUP_SECONDS = 1.0
SIZES = ("weights", "kv", "state", "rest", "peak_allocated", "peak_reserved")


class Table(NamedTuple):
    """Cells by the headings of their columns."""

    title: str
    columns: dict[str, list[str]]

    @property
    def rows(self) -> list[list[str]]:
        """The headings first."""
        return [list(self.columns), *map(list, zip(*self.columns.values(), strict=True))]


def tables(result: ProfileResult) -> list[Table]:
    """Speed, what gains come from, and memory."""
    return [
        Table("Speed", _filled({**_names(result, result.points, stack=True), **_speed(result)})),
        Table("Gains", _filled(_gains(result))),
        Table("Memory", _filled({**_names(result, result.points, stack=True), **_memory(result.points)})),
    ]


def method(result: ProfileResult) -> str:
    """How the figures came about, and what is the same in all of them."""
    first = result.points[0]
    parts = [] if _vary(result, "batch_size") else [f"batch {first.batch_size:,}"]
    parts += [] if _vary(result, "new_tokens") else [f"{first.new_tokens:,} new tokens"]
    parts.append(f"medians (lowest to highest) of {result.repeats} interleaved repeats")
    parts.append(f"floor at {result.bandwidth / 1e9:,.1f} GB/s")
    gains = f"gains on {result.stack}: the stack's over transformers' fastest, the layers' over the first model"
    return f"{', '.join(parts)}; {gains}"


def as_csv(result: ProfileResult) -> str:
    """A line for each point: medians, lowest and highest values, sizes; empty where the memory was not enough."""
    place = ["label", "stack", "prompt", "new_tokens", "batch_size"]
    values = [f"{name}{end}" for name in QUANTITIES for end in ("", "_low", "_high")]
    floor = ["step_bytes", "floor_tokens_per_second", "share_of_floor"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*place, "out_of_memory", *values, *floor, "setup_seconds", *(f"{size}_bytes" for size in SIZES)])
    for point in result.points:
        measured = point.measured
        cells: list[object] = [getattr(point, name) for name in place] + [int(measured is None)]
        cells += [*_values(measured), *(getattr(point, name) for name in floor)]
        cells.append(measured and measured.setup_seconds)
        cells += [measured and getattr(measured.memory, size) for size in SIZES]
        writer.writerow(cells)
    return text.getvalue()


def _values(measured: Measurement | None) -> Sequence[object]:
    if measured is None:
        return [None] * 3 * len(QUANTITIES)
    repeats: list[Repeats] = [getattr(measured, name) for name in QUANTITIES]
    return [value for each in repeats for value in (each.median, each.low, each.high)]


def _names(result: ProfileResult, points: Sequence[ProfilePoint], stack: bool = False) -> dict[str, list[str]]:
    """What the rows are of; new tokens and batch only where they vary."""
    columns = {"model": [point.label for point in points]}
    if stack:
        columns["stack"] = [point.stack for point in points]
    columns["prompt"] = [f"{point.prompt:,}" for point in points]
    if _vary(result, "new_tokens"):
        columns["new"] = [f"{point.new_tokens:,}" for point in points]
    if _vary(result, "batch_size"):
        columns["batch"] = [f"{point.batch_size:,}" for point in points]
    return columns


def _vary(result: ProfileResult, field: str) -> bool:
    return len({getattr(point, field) for point in result.points}) > 1


def _speed(result: ProfileResult) -> dict[str, list[str]]:
    def column(show: Callable[[Measurement], str]) -> list[str]:
        return [show(point.measured) if point.measured else OOM for point in result.points]

    shares = [point.share_of_floor for point in result.points]
    setups = [point.measured.setup_seconds for point in result.points if point.measured]
    columns = {
        "prefill ms": column(lambda found: _spread(found.prefill_seconds, 1e3)),
        "first token ms": column(lambda found: _spread(found.first_token_seconds, 1e3)),
        "tokens/s": column(lambda found: _spread(found.decode_tokens_per_second)),
        "floor": [_short(point.floor_tokens_per_second) for point in result.points],
        "of the floor": [OOM if share is None else f"{share:.0%}" for share in shares],
    }
    if _vary(result, "new_tokens"):
        columns["total s"] = column(lambda found: _spread(found.total_seconds))
    if max(setups, default=0.0) >= NOTABLE_SETUP_SECONDS:
        columns["set-up s"] = column(lambda found: _short(found.setup_seconds))
    return columns


def _memory(points: Sequence[ProfilePoint]) -> dict[str, list[str]]:
    def column(size: Callable[[Memory], int | None]) -> list[str]:
        sizes = [size(point.measured.memory) if point.measured else None for point in points]
        return ["" if size is None else _short(size / 2**20) for size in sizes]

    return {
        "weights MiB": column(lambda memory: memory.weights),
        "KV MiB": column(lambda memory: memory.kv),
        "state MiB": column(lambda memory: memory.state),
        "rest MiB": column(lambda memory: memory.rest),
        "peak MiB": column(lambda memory: memory.peak_allocated),
        "reserved MiB": column(lambda memory: memory.peak_reserved),
        "": ["" if point.measured else OOM for point in points],
    }


def _gains(result: ProfileResult) -> dict[str, list[str]]:
    """The stack's gain and the layers', of each model and place, on the stack that models are compared on."""
    stacks = {(gain.label, gain.place): gain for gain in stack_gains(result)}
    layers = {(row.label, row.place): row for row in compare(result) if row.stack == result.stack}
    points = [point for point in result.points if point.stack == result.stack]
    found = [(stacks.get((point.label, point.place)), layers.get((point.label, point.place))) for point in points]
    return {
        **_names(result, points),
        "stack over": [(gain.best or OOM) if gain else "" for gain, _ in found],
        "stack: first token": [_times(gain and gain.first_token_speed) for gain, _ in found],
        "stack: tokens/s": [_times(gain and gain.decode_speed) for gain, _ in found],
        "layers: prefill": [_times(row and row.prefill_speed) for _, row in found],
        "layers: tokens/s": [_times(row and row.decode_speed) for _, row in found],
        "by bytes": [_times(row and row.decode_speed_by_bytes) for _, row in found],
        "cache": [_times(row and row.cache_bytes) for _, row in found],
        "peak": [_times(row and row.peak_bytes) for _, row in found],
    }


def _filled(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _spread(repeats: Repeats, scale: float = 1.0) -> str:
    median, low, high = (_short(value * scale) for value in (repeats.median, repeats.low, repeats.high))
    return median if len(repeats.each) == 1 else f"{median} ({low} to {high})"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} x"


def _short(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
