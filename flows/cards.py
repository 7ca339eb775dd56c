"""What the cards of a run's steps show: live progress and curves while it works, then scores, answers and speed.

A card class is a ``Reporter``, to be handed to ``support.stage`` in a step with ``@card(type="blank", id=...)``; the id is
the class's. Where the running step has no such card, everything here does nothing.
"""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import card_charts as charts
from metaflow import current
from metaflow.cards import Image, Markdown, ProgressBar, Table, ValueBox, VegaChart

from matvlm.artifacts import EvalResult, ProfileResult
from matvlm.reporting import Reporter

if TYPE_CHECKING:
    from matvlm.evaluate import ComparedSample

REFRESH_SECONDS = 15.0
"""Between two updates of a page. Each one starts a process that imports the flow anew, on the cores that train."""

SAMPLES_A_ROW = 4


class LiveCard(Reporter):
    """The card ``id`` of the running step, with a title and a progress bar. What is shown last is always kept:
    Metaflow draws the page once more at the end of the step."""

    id = ""
    unit = ""

    def __init__(self, title: str):
        self._page = _page(self.id)
        self._bar = ProgressBar(max=100, unit="%", label=self.unit)
        self._first: tuple[float, int] | None = None
        self._refreshed = -math.inf
        self.append(Markdown(f"# {_plain(title)}"), self._bar)

    def append(self, *components: Any) -> None:
        """Add Metaflow card components below what is there."""
        if self._page is not None:
            self._page.extend(components)

    def progress(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        started, before = self._first
        rate = (done - before) / (now - started) if now > started else 0.0
        if done >= total:
            left = f"finished in {_duration(now - started)}"
        else:
            left = f"{_duration((total - done) / rate)} left" if rate else "just started"
        percent = round(100 * done / total) if total else 100
        self._bar.update(percent, metadata=f"{done:,} of {total:,} {self.unit}, {left}")
        self.refresh()

    def refresh(self) -> None:
        """Bring the page up to date, at most every ``REFRESH_SECONDS``."""
        now = time.monotonic()
        if self._page is not None and now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            self._page.refresh()


class DistillCard(LiveCard):
    """Losses, learning rate and throughput of a distillation, as ``distill`` reports them at each logged update."""

    id = "distill"
    unit = "updates"

    TILES = (
        ("loss", "loss", ""),
        ("lr", "learning rate", ""),
        ("samples_per_second", "samples / s", ""),
        ("tokens_per_second", "tokens / s", ""),
        ("memory_gb", "memory", " GB"),
    )
    LOSSES = {"loss": "total", "loss_prob": "probabilities", "loss_layer": "layers", "loss_ce": "answer"}

    def __init__(self, title: str):
        super().__init__(title)
        self._tiles = {name: ValueBox(title=heading, value="–") for name, heading, _ in self.TILES}
        self._losses = charts.Curves("Losses", log=True)
        self._rates = {
            "lr": charts.Curves("Learning rate", height=150, number_format="~e"),
            "samples_per_second": charts.Curves("Samples per second", height=150, number_format="~s"),
        }
        below = [VegaChart(curves.spec) for curves in self._rates.values()]
        self.append(Table([list(self._tiles.values())]), VegaChart(self._losses.spec), Table([below]))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for name, _, unit in self.TILES:
            if name in values:
                self._tiles[name].update(value=_number(values[name]) + unit)
        self._losses.add(step, {title: values[name] for name, title in self.LOSSES.items() if name in values})
        for name, curves in self._rates.items():
            if name in values:
                curves.add(step, {name: values[name]})
        self.refresh()


class EvaluateCard(LiveCard):
    """The evaluation of one model."""

    id = "evaluate"
    unit = "questions"

    def show(self, result: EvalResult) -> None:
        """Its scores; accuracies in percent."""
        rows = [[_plain(name.replace("_", " ")), _percent(value)] for name, value in result.metrics.items()]
        facts = f"{result.num_questions:,} questions in {_duration(result.seconds)}. Model: {_plain(result.checkpoint_uri)}"
        self.append(Markdown(f"## {_plain(result.label)}"), Table(rows, ["Score", "Value"]), Markdown(facts))


class ProfileCard(LiveCard):
    """Speed and memory of several models side by side."""

    id = "profile"
    unit = "measurements"

    def show(self, result: ProfileResult, baseline: str = "teacher") -> None:
        """Curves over the context length, the ratios to ``baseline`` where it was measured, every figure, the machine."""
        points = result.points
        decode = [(p.label, p.context, p.decode_tokens_per_second) for p in points]
        cache = [(p.label, p.context, p.cache_bytes / 2**20) for p in points]
        self.append(
            Table(
                [
                    [
                        VegaChart(charts.over_context("Decoding speed", "tokens / s", decode)),
                        VegaChart(charts.over_context("Cache (KV and recurrent state)", "MiB", cache)),
                    ]
                ]
            )
        )
        if any(p.label == baseline for p in points) and any(p.label != baseline for p in points):
            self.append(Markdown(f"## Against the {_plain(baseline)}"), _ratios(result, baseline))
        self.append(Markdown("## All figures"), _figures(result), Markdown("## Measured on"), _machine(result))


def show_comparison(rows: Sequence[Mapping[str, Any]], samples: Sequence[ComparedSample]) -> None:
    """Fill the card ``compare`` with the models' accuracies and with questions as teacher and student answered them.

    Args:
        rows: one mapping per model, the teacher's first: ``label`` and ``accuracy`` in [0, 1]; where known ``init``,
            ``updates``, ``num_questions``, ``share`` (of the teacher's accuracy) and ``kinds``, a mapping from the kind
            of question to its accuracy.
        samples: from ``matvlm.evaluate.compare_samples``.
    """
    page = _page("compare")
    if page is None:
        return
    page.extend([Markdown("# Teacher and student"), _accuracies(rows), VegaChart(charts.accuracy_bars(rows))])
    if samples:
        page.extend([Markdown("## The same questions, two answers"), _answers(samples)])


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The columns that some row fills."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.get("kinds") or {}))
    columns = {
        "Model": [_plain(row["label"]) for row in rows],
        "Initialised": [_plain(row.get("init") or "") for row in rows],
        "Updates": [f"{row['updates']:,}" if row.get("updates") else "" for row in rows],
        "Accuracy": [f"**{_percent(row['accuracy'])}**" for row in rows],
        "Of the teacher's": [_percent(row.get("share")) for row in rows],
        **{kind.replace("_", " / "): [_percent((row.get("kinds") or {}).get(kind)) for row in rows] for kind in kinds},
        "Questions": [f"{row['num_questions']:,}" if row.get("num_questions") else "" for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return Table([[Markdown(cell) for cell in row] for row in zip(*filled.values(), strict=True)], list(filled))


def _answers(samples: Sequence[ComparedSample]) -> Table:
    """A grid: a row of pictures, below it a row of what was asked and answered."""
    rows: list[list[Any]] = []
    for first in range(0, len(samples), SAMPLES_A_ROW):
        shown = samples[first : first + SAMPLES_A_ROW]
        rows.append([Image(sample.png) for sample in shown])
        rows.append([Markdown(_answered(sample)) for sample in shown])
    return Table(rows)


def _answered(sample: ComparedSample) -> str:
    def line(who: str, answer: str, right: bool) -> str:
        return f"{'✅' if right else '❌'} {who}: **{_plain(answer) or '(nothing)'}**"

    return "\n\n".join(
        [
            f"*{_plain(sample.question)}*",
            f"expected: **{_plain(sample.expected)}**",
            line("teacher", sample.teacher_answer, sample.teacher_right),
            line("student", sample.student_answer, sample.student_right),
        ]
    )


def _ratios(result: ProfileResult, baseline: str) -> Table:
    from matvlm.profiling import compare

    rows = [
        [
            _plain(row.label),
            f"{row.context:,}",
            f"{row.prefill_speed:.2f} ×",
            f"{row.decode_speed:.2f} ×",
            f"{row.cache_bytes:.2f} ×",
            f"{row.peak_bytes:.2f} ×" if row.peak_bytes else "–",
        ]
        for row in compare(result, baseline)
    ]
    return Table(rows, ["Model", "Context", "Prefill speed", "Decoding speed", "Cache size", "Peak memory"])


def _figures(result: ProfileResult) -> Table:
    rows = [
        [
            _plain(p.label),
            f"{p.context:,}",
            _number(1000 * p.prefill_seconds),
            _number(p.decode_tokens_per_second),
            _number(p.cache_bytes / 2**20),
            _number(p.peak_bytes / 2**20) if p.peak_bytes else "–",
        ]
        for p in result.points
    ]
    return Table(rows, ["Model", "Context", "Prefill [ms]", "Decoding [tokens / s]", "Cache [MiB]", "Peak memory [MiB]"])


def _machine(result: ProfileResult) -> Table:
    method = f"medians of {result.repeats} repeats, {result.new_tokens} new tokens, batch {result.points[0].batch_size}"
    return Table([[_plain(name), _plain(value)] for name, value in {**result.machine, "method": method}.items()])


def _page(card: str) -> Any | None:
    """Metaflow's manager of the running step's card with this id; None where there is none."""
    collector = getattr(current, "card", None)
    if collector is None or not collector.get(type="blank"):
        return None
    return collector[card] or None


def _plain(text: str) -> str:
    """``text`` to be shown as it is, within Markdown."""
    return re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(str(text), quote=False))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    """Three digits, without an exponent where the number is of everyday size."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
