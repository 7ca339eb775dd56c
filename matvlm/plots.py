"""The project's pictures, as PNG files: loss curves, speed and memory over context, accuracies side by side.

Colours are from a palette that stays apart for colour-blind readers; every series also has its own marker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matvlm.artifacts import ProfilePoint, ProfileResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
}


def loss_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses over optimiser updates, and the learning rate below when it is known.

    Args:
        history: a mapping per logged update: ``update``, any number of keys with ``loss`` in their name, maybe ``lr``.
        path: the PNG to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    names = sorted({name for row in history for name in row if "loss" in name})
    if not names:
        raise ValueError(f"{path}: nothing to draw, the history has no loss")
    has_rate = any("lr" in row for row in history)
    ratios = [3, 1] if has_rate else [1]
    figure, axes = _figure(rows=len(ratios), size=(7.5, 5.0), height_ratios=ratios, sharex=True)
    for number, name in enumerate(names):
        axes[0].plot(*_series(history, name), color=_colour(number), label=name, linewidth=1.6)
    axes[0].set_ylabel("loss")
    if all(row[name] > 0 for row in history for name in names if name in row):
        _log_axis(axes[0])
    axes[0].legend(frameon=False)
    if has_rate:
        axes[1].plot(*_series(history, "lr"), color="0.35", linewidth=1.4)
        axes[1].set_ylabel("learning rate")
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes[-1].set_xlabel("optimiser updates")
    _save(figure, path)


def speed_memory(result: ProfileResult, path: Path) -> None:
    """Prefill seconds, decoding speed and cache size over the context length, one line per model.

    Raises:
        ValueError: the result has no point.
    """
    if not result.points:
        raise ValueError(f"{path}: nothing to draw, the profile has no point")
    labels = list(dict.fromkeys(point.label for point in result.points))
    figure, axes = _figure(columns=3, size=(13.0, 4.2))
    for number, label in enumerate(labels):
        points = sorted((p for p in result.points if p.label == label), key=lambda point: point.context)
        contexts = [point.context for point in points]
        look = {"color": _colour(number), "marker": MARKERS[number % len(MARKERS)], "label": label}
        for axis, values in zip(axes, _profile_series(points), strict=True):
            axis.plot(contexts, values, **look)
    for axis, (title, unit) in zip(axes, _PROFILE_PANELS, strict=True):
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.set_ylim(0, 1.08 * axis.dataLim.ymax)
        _context_axis(axis, sorted({point.context for point in result.points}))
    axes[0].legend(frameon=False)
    figure.suptitle(_measured_on(result), fontsize=9, color="0.35")
    _save(figure, path)


def accuracy_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracies as bars, in the order given, with the 95 % interval of the binomial where the number is known.

    Args:
        rows: mappings with ``label``, ``accuracy`` in [0, 1] and maybe ``num_questions``.
        path: the PNG to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not rows:
        raise ValueError(f"{path}: nothing to draw, there is no accuracy")
    figure, (axis,) = _figure(size=(7.5, 1.2 + 0.55 * len(rows)))
    percents = [100 * row["accuracy"] for row in rows]
    errors = [_half_interval(row["accuracy"], row.get("num_questions")) for row in rows]
    positions = range(len(rows))
    axis.barh(positions, percents, color=[_colour(number) for number in positions], height=0.62)
    axis.errorbar(percents, positions, xerr=errors, fmt="none", ecolor="0.25", elinewidth=1.2, capsize=3)
    for position, percent, error in zip(positions, percents, errors, strict=True):
        axis.annotate(f"{percent:.1f} %", (percent + error, position), (5, 0), textcoords="offset points", va="center")
    axis.set_yticks(positions, [str(row["label"]) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel("accuracy [%]")
    axis.grid(visible=False, axis="y")
    _save(figure, path)


_PROFILE_PANELS = (
    ("Prefill", "seconds"),
    ("Decoding", "tokens / second"),
    ("Cache (KV and recurrent state)", "MiB"),
)


def _profile_series(points: list[ProfilePoint]) -> list[list[float]]:
    """The values of each of ``_PROFILE_PANELS``."""
    return [
        [point.prefill_seconds for point in points],
        [point.decode_tokens_per_second for point in points],
        [point.cache_bytes / 2**20 for point in points],
    ]


def _measured_on(result: ProfileResult) -> str:
    machine = result.machine
    place = machine.get("gpu") or f"{machine.get('cpu', 'CPU')}, {machine.get('threads', '?')} threads"
    return (
        f"{place}; batch {result.points[0].batch_size}, {result.new_tokens} new tokens, "
        f"median of {result.repeats} interleaved repeats"
    )


def _context_axis(axis: Any, contexts: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in contexts])
    axis.minorticks_off()
    axis.set_xlabel("context [tokens]")


def _log_axis(axis: Any) -> None:
    """A logarithmic vertical axis with plain numbers, so that a loss of 0.3 reads as 0.3."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(LogLocator(subs="all"))
    axis.tick_params(axis="y", which="minor", labelleft=False)


def _series(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if name in row]
    return [row["update"] for row in rows], [row[name] for row in rows]


def _half_interval(share: float, count: int | None) -> float:
    """Half the normal 95 % interval of a share of ``count``, in percent; 0 where the count is unknown."""
    return 196 * math.sqrt(share * (1 - share) / count) if count else 0.0


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _figure(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any) -> tuple[Any, list[Any]]:
    """A figure on the off-screen canvas and its axes in reading order, whatever backend the process uses."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png")
