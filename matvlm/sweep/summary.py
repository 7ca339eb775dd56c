"""The results of a sweep side by side: a table with a row for each point, its numbers over the seeds, and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matvlm import plots
from matvlm.artifacts import ProfileResult
from matvlm.reporting import Reporter
from matvlm.storage import write_bytes, write_json
from matvlm.sweep.results import PointResult, Summary
from matvlm.sweep.settings import TEACHER, Sweep
from matvlm.tracking import environment

KL = "KL [nats]"
Format = Callable[[float], str]


def summarise(sweep: Sweep, teacher: PointResult, points: Sequence[PointResult], speed: ProfileResult) -> Summary:
    """All that came out of ``sweep``, and what it was made with here."""
    made_with = {name.removeprefix("env."): value for name, value in environment().items()}
    machines = dict.fromkeys(result.machine for result in points if result.machine)
    return Summary(
        sweep=sweep.model_dump(mode="json"),
        environment=made_with | {"machine": ", ".join(machines)},
        teacher=teacher,
        points=list(points),
        profile=speed,
    )


def write_summary(summary: Summary, folder: Path, reporter: Reporter) -> None:
    """``summary.json``, ``summary.md`` and, if there is something to draw, ``curves.png`` and ``tradeoff.png``.

    They go into ``folder`` and are kept with the run under ``report``; ``reporter`` also gets ``headline``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "summary.json", summary.model_dump(mode="json"))
    write_bytes(folder / "summary.md", (table(summary) + "\n" + notes(summary)).encode())
    names = ["summary.json", "summary.md"]
    curves = {name: [result.curve for result in results] for name, results in groups(summary).items()}
    if any(curve for seeds in curves.values() for curve in seeds):
        plots.validation_curves(curves, folder / "curves.png")
        names.append("curves.png")
    scores = {name: score for name, results in groups(summary).items() if (score := _mean_score(results)) is not None}
    speed = summary.profile
    if any(point.measured and point.label in scores and point.stack == speed.stack for point in speed.points):
        plots.tradeoff(scores, speed, folder / "tradeoff.png")
        names.append("tradeoff.png")
    for name in names:
        reporter.artifact(folder / name, "report")
    reporter.metrics(headline(summary))


def groups(summary: Summary) -> dict[str, list[PointResult]]:
    """The results of each point, one for each seed, in the order of the sweep; the teacher first."""
    found: dict[str, list[PointResult]] = {TEACHER: [summary.teacher]}
    for result in summary.points:
        found.setdefault(result.name, []).append(result)
    return found


def table(summary: Summary) -> str:
    """A row for each point as Markdown; of several seeds the mean, with the lowest and the highest."""
    columns = _columns(summary)
    rows = [[cell(results) for cell in columns.values()] for results in groups(summary).values()]
    lines = [list(columns), ["---", "---", *["--:"] * (len(columns) - 2)], *rows]
    failures = [_failures(results) for results in groups(summary).values()]
    if any(failures):
        lines = [[*line, end] for line, end in zip(lines, ["failed", "---", *failures], strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notes(summary: Summary) -> str:
    """What one has to know to read the table, a line each."""
    said = ["Several seeds: mean (lowest-highest)."]
    if any(result.final_kl is not None for result in summary.points):
        said.append("KL: of teacher and student at the last update, per answer position of samples not trained on.")
    differing = {field for result in summary.points for field in result.overrides}
    if any(field.startswith("targets.") or field == "distill.loss.temperature" for field in differing):
        said.append(
            "Points with other targets, or another temperature, have a KL of another kind: it does not compare."
        )
    again = [f"{r.name}, seed {r.seed} (from update {r.continued_from})" for r in summary.points if r.continued_from]
    if again:
        said.append(f"Interrupted, with the seconds of the last attempt only: {', '.join(again)}.")
    measured = {point.label for point in summary.profile.points}
    done = [result for result in summary.points if result.error is None]
    if left := {len(result.layers) for result in done} - {len(r.layers) for r in done if r.name in measured}:
        sizes = ", ".join(map(str, sorted(left)))
        said.append(
            f"Not profiled, as no model was kept of the first of them, which failed: students with {sizes} mixers."
        )
    return "".join(f"{line}\n" for line in [*said, f"Machine: {summary.environment['machine']}."])


def headline(summary: Summary) -> dict[str, float]:
    """What sweeps are compared by: means over the seeds, ``POINT/final_kl`` and so on, and how many runs failed."""
    numbers = {"failed_points": float(sum(result.error is not None for result in summary.points))}
    goal = reference_kl(summary)
    for name, results in groups(summary).items():
        found: dict[str, list[float | None]] = {
            "final_kl": [result.final_kl for result in results],
            "updates_to_reference": [updates_to(result.curve, goal) for result in results],
            "seconds/distill": [result.seconds.get("distill") for result in results],
            "peak_memory_gb": [result.peak_memory_bytes / 1e9 or None for result in results],
            **{f"score/{task}": _scores(results, task) for task in _tasks(summary)},
            **{metric: [result.metrics.get(metric) for result in results] for metric in _perplexities(summary)},
        }
        for field, values in found.items():
            if known := _known(values):
                numbers[f"{name}/{field}"] = statistics.fmean(known)
    return numbers


def reference_kl(summary: Summary) -> float | None:
    """The final divergence of the sweep's reference, the mean of its seeds; None where there is none."""
    known = _known(result.final_kl for result in groups(summary).get(summary.sweep.get("reference") or "", []))
    return statistics.fmean(known) if known else None


def updates_to(curve: Sequence[tuple[int, float]], goal: float | None) -> int | None:
    """The first validated update at which the divergence is at most ``goal``; None if there is none."""
    return None if goal is None else next((update for update, value in curve if value <= goal), None)


def _columns(summary: Summary) -> dict[str, Callable[[list[PointResult]], str]]:
    """Heading -> what a row has there."""
    goal, reference = reference_kl(summary), summary.sweep.get("reference")
    columns: dict[str, Callable[[list[PointResult]], str]] = {
        "point": lambda results: results[0].name,
        "differs from the base in": lambda results: _differences(results[0].overrides),
        "layers": _column(lambda result: len(result.layers), "{:g}"),
    }
    for task in _tasks(summary):
        columns[task] = _column(lambda result, task=task: _score(result, task), "{:.2f}")
        columns[f"{task}: of the teacher's"] = _column(
            lambda result, task=task: _share(result, summary.teacher, task), "{:.1%}"
        )
    columns[KL] = _column(lambda result: result.final_kl, "{:.4f}")
    for metric in _perplexities(summary):
        columns[metric] = _column(lambda result, metric=metric: result.metrics.get(metric), "{:.2f}")
    if reference:
        columns[f"updates to {reference}'s KL"] = lambda results: _reached(results, goal)
    columns["distillation [s]"] = _column(lambda result: result.seconds.get("distill"), "{:,.1f}")
    columns["memory [GB]"] = _column(lambda result: result.peak_memory_bytes / 1e9 or None, "{:.2f}")
    return columns


def _column(value: Callable[..., float | None], form: str) -> Callable[[list[PointResult]], str]:
    return lambda results: _spread(_known(value(result) for result in results if result.error is None), form)


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))}-{form.format(max(values))})"


def _reached(results: list[PointResult], goal: float | None) -> str:
    those = [result for result in results if result.error is None]
    reached = _known(updates_to(result.curve, goal) for result in those)
    note = f", {len(reached)} of {len(those)} seeds" if reached and len(reached) < len(those) else ""
    return _spread(reached, "{:,.0f}") + note


def _failures(results: list[PointResult]) -> str:
    lines = []
    for result in results:
        seed = f"seed {result.seed}: " if result.seed is not None and len(results) > 1 else ""
        errors = [result.error] if result.error else [f"{task}: {error}" for task, error in result.failed_tasks.items()]
        lines += [seed + " ".join(error.split()).replace("|", "/") for error in errors]
    return "; ".join(lines)


def _differences(overrides: dict[str, Any]) -> str:
    texts = {field: value if isinstance(value, str) else json.dumps(value) for field, value in overrides.items()}
    return ", ".join(f"{field}={text}" for field, text in texts.items()).replace("|", "/") or "-"


def _tasks(summary: Summary) -> list[str]:
    """Those that anyone has a score of."""
    return list(dict.fromkeys(task for result in (summary.teacher, *summary.points) for task in result.scores))


def _perplexities(summary: Summary) -> list[str]:
    everyone = (summary.teacher, *summary.points)
    return sorted({metric for result in everyone for metric in result.metrics if "perplexity" in metric})


def _score(result: PointResult, task: str) -> float | None:
    return result.scores[task].value if task in result.scores else None


def _scores(results: list[PointResult], task: str) -> list[float | None]:
    return [_score(result, task) for result in results]


def _share(result: PointResult, teacher: PointResult, task: str) -> float | None:
    own, whole = _score(result, task), _score(teacher, task)
    return None if own is None or not whole else own / whole


def _mean_score(results: list[PointResult]) -> float | None:
    known = _known(result.mean_score for result in results)
    return statistics.fmean(known) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
