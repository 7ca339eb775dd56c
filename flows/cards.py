"""What the cards of a run's steps show: live progress and curves while it works, then scores, answers and speed.

A card class is a ``Reporter``, to be handed to ``support.stage`` in a step with ``@card(type="blank", id=...)``; the
id is the class's. Where the running step has no such card, everything here does nothing.

A card's Markdown lets HTML through and loses escaped characters, so whatever a model, data or a recipe wrote goes into
table cells, which show text as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import card_charts as charts
from metaflow import current
from metaflow.cards import Image, Markdown, ProgressBar, Table, ValueBox, VegaChart

from matvlm.artifacts import EvalResult, ProfileResult
from matvlm.plots import profile_panels
from matvlm.reporting import Reporter

if TYPE_CHECKING:
    from matvlm.evaluate import ComparedSample, ScoreRow

REFRESH_SECONDS = 10.0
"""Between two updates of a page. Each starts a process that imports the flow anew, on the cores that train: 0.6 s of a
core for a flow that imports little, 6 s for one that imports torch and transformers."""


class _Bar(ProgressBar):
    """A progress bar that learns its total on the way."""

    def show(self, done: int, total: int, note: str) -> None:
        self._max = total
        self.update(done, metadata=note)


class LiveCard(Reporter):
    """The card ``id`` of the running step, with a title and a progress bar.

    What was reported last is always shown in the end: Metaflow draws the page once more when the step is over.
    """

    id = ""
    unit = ""

    def __init__(self, title: str):
        self._page = _page(self.id)
        self._bar = _Bar(label=self.unit)
        self._first: tuple[float, int] | None = None
        self._refreshed = -math.inf
        self.append(Markdown("# " + title.replace("<", "‹")), self._bar)

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
        self._bar.show(done, total, left)
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
        {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"},
        {"samples_per_second": "samples / s", "tokens_per_second": "tokens / s", "memory_gb": "memory [GB]"},
    )
    LOSSES: ClassVar = {
        "loss": "total",
        "loss_prob": "probabilities",
        "loss_layer": "layers",
        "loss_ce": "answer",
        "loss_ce_teacher": "teacher's answer",
        "loss_logits_l2": "logits",
    }

    def __init__(self, title: str):
        super().__init__(title)
        self._tiles = {name: ValueBox(heading, "–") for row in self.TILES for name, heading in row.items()}
        self._losses = charts.Curves("Losses", log=True)
        self._others = {
            "lr": charts.Curves("Learning rate", single=True, number_format="~e"),
            "samples_per_second": charts.Curves("Samples per second", single=True, number_format="~s"),
        }
        tiles = Table([[self._tiles[name] for name in row] for row in self.TILES])
        below = Table([[VegaChart(curves.spec) for curves in self._others.values()]])
        self.append(tiles, VegaChart(self._losses.spec), below)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        for name, tile in self._tiles.items():
            if name in values:
                tile.update(value=_number(values[name]))
        self._losses.add(step, {title: values[name] for name, title in self.LOSSES.items() if name in values})
        for name, curves in self._others.items():
            if name in values:
                curves.add(step, {name: values[name]})
        self.refresh()


class EvaluateCard(LiveCard):
    """The evaluation of one model."""

    id, unit = "evaluate", "questions"

    def show(self, result: EvalResult) -> None:
        """Its scores with their standard errors on the scale of papers, every metric, and how they came about."""
        scores = [[task, str(score), score.metric.replace("_", " ")] for task, score in result.scores.items()]
        metrics = [[name.replace("_", " "), f"{value:.4f}"] for name, value in result.metrics.items()]
        facts = [
            *([f"{task} failed", error] for task, error in result.failed.items()),
            ["questions", f"{result.num_questions:,} in {_duration(result.seconds)}"],
            ["model", result.checkpoint_uri],
        ]
        shown = [Table(scores, ["task", result.label, "score"])] if scores else []
        self.append(*shown, Table(metrics, ["metric", result.label]), Table(facts))


class ProfileCard(LiveCard):
    """Speed and memory of several models side by side."""

    id = "profile"
    unit = "measurements"

    def show(self, result: ProfileResult) -> None:
        """Curves over the length, what gains come from, every figure, the machine."""
        from matvlm.profiling.tables import method, tables

        curves = [charts.over_length(result, *panel) for panel in profile_panels(result)]
        self.append(Table([[VegaChart(curve) for curve in curves]]))
        for title, columns in tables(result):
            self.append(Markdown(f"## {title}"), _table(columns))
        facts = [[name, value] for name, value in {**result.machine, "method": method(result)}.items()]
        self.append(Markdown("## Measured on"), Table(facts))


def show_comparison(
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[ComparedSample],
    scores: Sequence[ScoreRow] = (),
    regressions: Sequence[ComparedSample] = (),
) -> None:
    """Fill the card ``compare`` with the models' accuracies and with questions as teacher and student answered them.

    Args:
        rows: a mapping per model with the fields of ``matvlm.report.Row``; accuracies are in [0, 1].
        samples, scores, regressions: from ``compare_samples``, ``compare`` and ``worst_regressions``.
    """
    page = _page("compare")
    if page is None:
        return
    page.append(Markdown("# Teacher and student"))
    if rows:
        page.extend([_accuracies(rows), VegaChart(charts.accuracy_bars(rows))])
    if scores:
        page.extend([Markdown("## Scores of each task"), _scores(scores)])
    if regressions:
        page.extend([Markdown("## Right before, wrong now"), _answers(regressions)])
    if samples:
        page.extend([Markdown("## The same questions, two answers"), _answers(samples)])


def _accuracies(rows: Sequence[Mapping[str, Any]]) -> Table:
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    columns = {
        "model": [row["label"] for row in rows],
        "initialised": [row["init"] for row in rows],
        "updates": [f"{row['updates']:,}" for row in rows],
        "accuracy": [_percent(row["accuracy"]) for row in rows],
        "of the teacher's": [_percent(row["share"]) for row in rows],
        **{kind.replace("_", "/"): [_percent(row["kinds"].get(kind)) for row in rows] for kind in kinds},
        "questions": [f"{row['num_questions']:,}" for row in rows],
    }
    return _table(columns)


def _scores(rows: Sequence[ScoreRow]) -> Table:
    columns = {
        "task": [row.task for row in rows],
        "score": [row.metric.replace("_", " ") for row in rows],
        "teacher": [str(row.teacher or "") for row in rows],
        "student": [str(row.student or "") for row in rows],
        "drop": ["" if row.drop is None else f"{row.drop:.2f}" for row in rows],
        "of the teacher's": ["" if row.drop_percent is None else _percent(row.drop_percent / 100) for row in rows],
        "note": [row.note for row in rows],
    }
    return _table(columns)


def _answers(samples: Sequence[ComparedSample]) -> Table:
    rows = [
        [
            Image(sample.png) if sample.png else "(no image)",
            sample.question,
            sample.expected,
            _marked(sample.teacher_answer, sample.teacher_right),
            _marked(sample.student_answer, sample.student_right),
        ]
        for sample in samples
    ]
    return Table(rows, ["image", "question", "expected", "teacher", "student"])


def _marked(answer: str, right: bool) -> str:
    return f"{'✓' if right else '✗'} {answer or '(nothing)'}"


def _table(columns: Mapping[str, list[str]]) -> Table:
    """Columns, by their headings, side by side; without those in which every cell is empty."""
    filled = {heading: cells for heading, cells in columns.items() if any(cells)}
    return Table([list(row) for row in zip(*filled.values(), strict=True)], list(filled))


def _page(card: str) -> Any | None:
    """Metaflow's manager of the running step's card with this id; None where there is none."""
    collector = getattr(current, "card", None)
    if collector is None or not collector.get(type="blank"):
        return None
    return collector[card] or None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}\N{NO-BREAK SPACE}%"


def _number(value: float) -> str:
    """Three digits, without an exponent where the number is of everyday size."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
