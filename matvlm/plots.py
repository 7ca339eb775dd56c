"""The project's pictures, as PNG files: loss curves, speed and memory over context, accuracies side by side.

Colours are from a palette that stays apart for colour-blind readers; every series also has its own marker.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matvlm.artifacts import Measurement, ProfilePoint, ProfileResult

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", ":", "-.")
"""Of further series when the colours are used up."""
DASHES = {"engine": "-", "hf": "--", "hf_static": "-."}
LOG_FROM = 4.0
"""Values of a profile that differ by more are drawn on a logarithmic axis."""
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


def validation_curves(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: Path) -> None:
    """The divergence on held-out samples over optimiser updates, a line for each name.

    Args:
        curves: by name, the (update, KL in nats) of each seed; of several there is a thin line each, and their mean.
        path: the PNG to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    drawn = {name: [seed for seed in seeds if seed] for name, seeds in curves.items() if any(seeds)}
    if not drawn:
        raise ValueError(f"{path}: nothing to draw, no curve has a point")
    figure, (axis,) = _figure(size=(7.5, 5.0))
    for number, (name, seeds) in enumerate(drawn.items()):
        look = {"color": _colour(number), "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
        for seed in seeds if len(seeds) > 1 else ():
            axis.plot(*zip(*seed, strict=True), linewidth=0.8, alpha=0.4, **look)
        axis.plot(*zip(*_mean_curve(seeds), strict=True), linewidth=1.8, label=name, **look)
    if all(value > 0 for seeds in drawn.values() for seed in seeds for _, value in seed):
        _log_axis(axis)
    axis.set_xlabel("optimiser updates")
    axis.set_ylabel("KL(teacher || student), held-out samples [nats]")
    axis.legend(frameon=False, fontsize=9)
    _save(figure, path)


def tradeoff(scores: Mapping[str, float], result: ProfileResult, path: Path) -> None:
    """The score over decoding speed and over memory, a dot for each model.

    They are those on the stack that models are compared on, at the longest of the places that most were measured at.

    Args:
        scores: by the label that a model has in ``result``.
        path: the PNG to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    found: dict[tuple[int, int, int], dict[str, Measurement]] = {}
    for point in result.points:
        if point.stack == result.stack and point.label in scores and point.measured:
            found.setdefault(point.place, {})[point.label] = point.measured
    if not found:
        raise ValueError(f"{path}: nothing to draw, no model with a score was measured")
    place = max(found, key=lambda place: (len(found[place]), place[0] + place[1], place))
    figure, axes = _figure(columns=2, size=(11.0, 4.6), sharey=True)
    for axis, (title, unit, value) in zip(axes, profile_panels(result), strict=False):
        for number, (label, measured) in enumerate(found[place].items()):
            look = {"marker": MARKERS[number % len(MARKERS)], "color": _colour(number), "label": label}
            axis.plot(value(measured), scores[label], linestyle="", markersize=9, **look)
        axis.set_title(title.partition(" (")[0])
        axis.set_xlabel(unit)
        axis.margins(0.15)
    axes[0].set_ylabel("score")
    axes[0].legend(frameon=False, fontsize=9)
    prompt, new_tokens, batch_size = place
    figure.suptitle(f"prompt {prompt:,}, {new_tokens:,} new tokens, batch {batch_size:,}", fontsize=9, color="0.35")
    _save(figure, path)


def speed_memory(result: ProfileResult, path: Path) -> None:
    """Decoding speed with the floor, memory, and time to the first token over the length, a line per ``series``.

    A model has its colour and a stack its dashes; where the memory was not enough it says so.

    Raises:
        ValueError: the result has no point.
    """
    if not result.points:
        raise ValueError(f"{path}: nothing to draw, the profile has no point")
    figure, axes = _figure(columns=3, size=(14.5, 4.6))
    labels = list(dict.fromkeys(point.label for point in result.points))
    panels = profile_panels(result)
    for number, (name, points) in enumerate(series(result).items()):
        look = {
            "color": _colour(labels.index(points[0].label)),
            "linestyle": DASHES.get(points[0].stack, "-"),
            "marker": MARKERS[number % len(MARKERS)],
            "label": name,
        }
        for axis, (_, _, value) in zip(axes, panels, strict=True):
            measured = [(length(result, point), value(point.measured)) for point in points if point.measured]
            axis.plot([at for at, _ in measured], [found for _, found in measured], **look)
        if points[0].stack == result.stack:
            floor = [point.floor_tokens_per_second for point in points]
            axes[0].plot([length(result, point) for point in points], floor, ":", color=look["color"], alpha=0.6)
        _mark_missing(axes[0], result, points, look["color"], 0.02 + 0.045 * number)
    for axis, (title, unit, _) in zip(axes, panels, strict=True):
        axis.set_title(title)
        axis.set_ylabel(unit)
        _length_axis(axis, result)
        _fit(axis)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(_measured_on(result), fontsize=9, color="0.35")
    _save(figure, path)


def series(result: ProfileResult) -> dict[str, list[ProfilePoint]]:
    """The points that make a line, in order of length, by its name: one model, stack and whatever else varies."""
    lines: dict[str, list[ProfilePoint]] = {}
    along = length_field(result)
    others = [field for field in ("new_tokens", "batch_size") if field != along and _varies(result, field)]
    units = {"new_tokens": "{:,} new", "batch_size": "batch {:,}"}
    for point in result.points:
        words = [point.label, point.stack, *(units[field].format(getattr(point, field)) for field in others)]
        lines.setdefault(", ".join(words), []).append(point)
    return {name: sorted(points, key=partial(length, result)) for name, points in lines.items()}


def length_field(result: ProfileResult) -> str:
    """What plots have as length: the prompt's, or the answer's if that alone varies."""
    return "new_tokens" if _varies(result, "new_tokens") and not _varies(result, "prompt") else "prompt"


def length(result: ProfileResult, point: ProfilePoint) -> int:
    return int(getattr(point, length_field(result)))


def profile_panels(result: ProfileResult) -> list[tuple[str, str, Callable[[Measurement], float]]]:
    """(title, unit, value) of each; memory is the peak where that could be measured."""
    memory = ("Cache (KV and recurrent state)", "MiB", lambda found: found.memory.cache / 2**20)
    if any(point.measured and point.measured.memory.peak_allocated for point in result.points):
        memory = ("Peak memory", "GiB", lambda found: (found.memory.peak_allocated or 0) / 2**30)
    return [
        ("Decoding (dotted: floor)", "tokens / second", lambda found: found.decode_tokens_per_second.median),
        memory,
        ("First token", "seconds", lambda found: found.first_token_seconds.median),
    ]


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


def _measured_on(result: ProfileResult) -> str:
    machine, first = result.machine, result.points[0]
    place = machine.get("gpu") or f"{machine.get('cpu', 'CPU')}, {machine.get('threads', '?')} threads"
    fields = {"prompt": f"prompt {first.prompt:,}", "new_tokens": f"{first.new_tokens:,} new tokens"}
    fields["batch_size"] = f"batch {first.batch_size:,}"
    same = ", ".join(text for field, text in fields.items() if not _varies(result, field))
    return f"{place}; {same}; median of {result.repeats} interleaved repeats"


def _varies(result: ProfileResult, field: str) -> bool:
    return len({getattr(point, field) for point in result.points}) > 1


def _mark_missing(axis: Any, result: ProfileResult, points: list[ProfilePoint], colour: str, height: float) -> None:
    for point in points:
        if point.measured is None:
            place = (length(result, point), height)
            axis.text(
                *place, "OOM", color=colour, transform=axis.get_xaxis_transform(), size=9, weight="bold", ha="center"
            )


def _length_axis(axis: Any, result: ProfileResult) -> None:
    lengths = sorted({length(result, point) for point in result.points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_xlabel("prompt [tokens]" if length_field(result) == "prompt" else "generated [tokens]")


def _fit(axis: Any) -> None:
    """A logarithmic vertical axis for values that are far apart, else one from zero."""
    low, high = axis.dataLim.intervaly
    if 0 < low < math.inf and high > LOG_FROM * low:
        _log_axis(axis)
    else:
        axis.set_ylim(0, 1.08 * high if high > 0 else 1.0)


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


def _mean_curve(seeds: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Over the updates at which every seed has a value; those of the longest where there are none."""
    values = [dict(seed) for seed in seeds]
    shared = [update for update in values[0] if all(update in others for others in values)]
    if not shared:
        return max((list(seed) for seed in seeds), key=len)
    return [(update, statistics.fmean(others[update] for others in values)) for update in shared]


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
