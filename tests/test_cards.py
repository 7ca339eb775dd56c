"""The cards as Metaflow writes them: readable without a network, true to the data, unharmed by what a model says."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "flows"))

import card_charts  # noqa: E402
import cards  # noqa: E402

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "is <img src=x onerror=alert(1)> a *red* thing?"

FLOW = f"""
import sys

sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "flows")!r}, {str(ROOT / "tests")!r}]

from metaflow import FlowSpec, card, step

import cards
from matvlm.artifacts import EvalResult, TaskScore
from tiny_profile import point, result

PNG = {PNG!r}


def show_all():
    from matvlm.evaluate import ComparedSample, ScoreRow
    from matvlm.report import Row

    distill = cards.DistillCard("Distillation of <b>the student")
    for update in range(1, 41):
        loss = float("nan") if update == 40 else 2 / update
        values = {{"loss": loss, "loss_prob": loss / 2, "lr": 1e-3 / update, "samples_per_second": 151.0 + update}}
        distill.metrics(values, update)
        distill.progress(update, 40)
    evaluate = cards.EvaluateCard("Evaluation")
    evaluate.progress(3, 10)
    metrics = {{"easyvqa/accuracy": 0.9571}}
    score = TaskScore(metric="accuracy", value=95.71, stderr=0.21)
    evaluate.show(EvalResult(label="<b>student", checkpoint_uri="runs/x", metrics=metrics, num_questions=9673,
                             seconds=92.0, samples_uri="s", scores={{"easyvqa": score}}, failed={{"pope": "no data"}}))
    points = [
        point(label, stack, prompt, decode=[speed], kv=size * prompt * 1024 - 1024, floor=1000.0,
              out_of_memory=(label, stack, prompt) == ("<i>teacher", "hf", 1024))
        for label, stack, speed, size in (("<i>teacher", "engine", 100.0, 8), ("<i>teacher", "hf", 50.0, 8),
                                          ("student", "engine", 150.0, 2)) for prompt in (256, 1024)
    ]
    profile = cards.ProfileCard("Speed and memory")
    profile.show(result(*points))
    kinds = {{"yes_no": 0.955}}
    rows = [
        Row("teacher", init="-", updates=0, accuracy=0.973, share=1.0, num_questions=9673, kinds={{}})._asdict(),
        Row("student", init="attention", updates=1200, accuracy=0.941, share=0.967, num_questions=9673, kinds=kinds)
        ._asdict(),
    ]
    sample = ComparedSample("1", {HOSTILE!r}, "no", "no", "yes", True, False, PNG)
    lost = ComparedSample("2", "lost?", "no", "no", "maybe", True, False, b"")
    scores = [ScoreRow("easyvqa", "accuracy", score, None, None, None, "student failed"),
              ScoreRow("pope", "f1", score, TaskScore(metric="f1", value=90.0), 5.71, 5.966)]
    cards.show_comparison(rows, [sample], scores, [lost])


class CardsFlow(FlowSpec):
    @card(type="blank", id="distill", refresh_interval=2)
    @card(type="blank", id="evaluate")
    @card(type="blank", id="compare")
    @card(type="blank", id="profile")
    @step
    def start(self):
        show_all()
        self.next(self.end)

    @card
    @step
    def end(self):
        cards.DistillCard("of no card").progress(1, 2)
        cards.show_comparison([], [])
        print("a step with another card is over")


if __name__ == "__main__":
    CardsFlow()
"""


class Clock:
    """Stands in for ``time.monotonic`` so that no test waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(cards.time, "monotonic", lambda: self.now)


class Page:
    """Stands in for Metaflow's manager of a card: keeps what it is given, counts the updates of the page."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.components: list[Any] = []
        self.refreshed = 0
        monkeypatch.setattr(cards, "_page", lambda card: self)

    def extend(self, components: Any) -> None:
        self.components += components

    def refresh(self) -> None:
        self.refreshed += 1


def run(folder: Path, *words: str) -> str:
    environment = {
        **os.environ,
        "METAFLOW_USER": "tester",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
    }
    command = [sys.executable, "flow.py", "--no-pylint", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("cards")
    (folder / "flow.py").write_text(FLOW, encoding="utf-8")
    return folder, run(folder, "run")


def page(flow: tuple[Path, str], card: str) -> dict[str, Any]:
    """What the page of a card draws. Fails on numbers that a browser's JSON parser refuses."""
    out = flow[0] / f"{card}.html"
    run(flow[0], "card", "get", "start", str(out), "--id", card)
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=.https?:", text), "the page needs a network"
    found = re.search(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', text)
    assert found, "the page holds no data"

    def refuse(name: str) -> None:
        raise AssertionError(f"{card}: {name} keeps a browser from reading the page")

    return json.loads(base64.b64decode(found[1]), parse_constant=refuse)


def parts(node: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Every component of one type, in order, at any depth."""
    if isinstance(node, dict):
        if node.get("type") == kind:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from parts(child, kind)


def cells(drawn: dict[str, Any]) -> list[list[Any]]:
    return [row for table in parts(drawn, "table") for row in table["data"]]


def test_distill_shows_the_last_values_and_every_finite_point(flow: tuple[Path, str]) -> None:
    drawn = page(flow, "distill")
    assert [part["source"] for part in parts(drawn, "markdown")] == ["# Distillation of ‹b>the student"]
    (bar,) = parts(drawn, "progressBar")
    assert (bar["value"], bar["max"], bar["label"]) == (40, 40, "updates")
    tiles = {tile["title"]: tile["value"] for tile in parts(drawn, "valueBox")}
    assert tiles == {
        "loss": "nan",
        "learning rate": "2.5e-5",
        "gradient norm": "–",
        "samples / s": "191",
        "tokens / s": "–",
        "memory [GB]": "–",
    }
    losses, rate, speed = (chart["spec"] for chart in parts(drawn, "vegaChart"))
    total = [point for point in losses["data"]["values"] if point["series"] == "total"]
    assert [point["update"] for point in total] == list(range(1, 40))
    assert total[3]["value"] == 0.5
    assert losses["encoding"]["y"]["scale"]["type"] == "log"
    assert rate["data"]["values"][1] == {"update": 2, "series": "lr", "value": 5e-4}
    assert len(speed["data"]["values"]) == 40


def test_evaluate_shows_scores_and_progress(flow: tuple[Path, str]) -> None:
    drawn = page(flow, "evaluate")
    (bar,) = parts(drawn, "progressBar")
    assert (bar["value"], bar["max"]) == (3, 10)
    assert cells(drawn) == [
        ["easyvqa", "95.71 ± 0.21", "accuracy"],
        ["easyvqa/accuracy", "0.9571"],
        ["pope failed", "no data"],
        ["questions", "9,673 in 92 s"],
        ["model", "runs/x"],
    ]
    assert next(parts(drawn, "table"))["columns"] == ["task", "<b>student", "score"]


def test_compare_shows_models_and_answers_with_their_pictures(flow: tuple[Path, str]) -> None:
    drawn = page(flow, "compare")
    accuracies, scores, regressions, answers = parts(drawn, "table")
    assert accuracies["columns"] == [
        "model",
        "initialised",
        "updates",
        "accuracy",
        "of the teacher's",
        "yes/no",
        "questions",
    ]
    assert accuracies["data"] == [
        ["teacher", "-", "0", "97.30\xa0%", "100.00\xa0%", "", "9,673"],
        ["student", "attention", "1,200", "94.10\xa0%", "96.70\xa0%", "95.50\xa0%", "9,673"],
    ]
    assert scores["data"] == [
        ["easyvqa", "accuracy", "95.71 ± 0.21", "", "", "", "student failed"],
        ["pope", "f1", "95.71 ± 0.21", "90.00", "5.71", "5.97\xa0%", ""],
    ]
    assert regressions["data"] == [["(no image)", "lost?", "no", "✓ no", "✗ maybe"]]
    (row,) = answers["data"]
    assert row[1:] == [HOSTILE, "no", "✓ no", "✗ yes"]
    assert row[0]["src"].startswith("data:image/png;base64,")
    assert base64.b64decode(row[0]["src"].partition(",")[2]) == PNG
    assert not any("onerror" in part["source"] for part in parts(drawn, "markdown"))
    (chart,) = parts(drawn, "vegaChart")
    assert [bar["percent"] for bar in chart["spec"]["data"]["values"]] == pytest.approx([97.3, 94.1])


def test_profile_shows_curves_gains_and_the_machine(flow: tuple[Path, str]) -> None:
    drawn = page(flow, "profile")
    speed, cache, first = (chart["spec"] for chart in parts(drawn, "vegaChart"))
    assert speed["data"]["values"][-1] == {
        "line": "student, engine",
        "model": "student",
        "stack": "engine",
        "length": 1024,
        "value": 150.0,
    }
    assert [point["value"] for point in cache["data"]["values"]] == [2.0, 8.0, 2.0, 0.5, 2.0]
    assert {point["value"] for point in first["data"]["values"]} == {0.2}
    assert speed["encoding"]["x"]["axis"]["values"] == [256, 1024]
    rows = cells(drawn)
    assert ["<i>teacher", "engine", "1,024", "100", "200", "100", "1,000", "10%"] in rows
    assert ["<i>teacher", "hf", "1,024", "OOM", "OOM", "OOM", "1,000", "OOM"] in rows
    assert ["<i>teacher", "256", "hf", "1.00 x", "2.00 x", "", "", "", ""] in rows
    assert ["student", "1,024", "", "", "", "1.00 x", "1.50 x", "1.00 x", "0.25 x"] in rows
    assert ["cpu", "Loom 9000"] in rows
    (method,) = [row[1] for row in rows if row[0] == "method"]
    assert method.startswith("batch 1, 4 new tokens, medians")
    assert not any("<i>" in part["source"] for part in parts(drawn, "markdown"))


def test_a_step_with_only_another_card_is_left_alone(flow: tuple[Path, str]) -> None:
    assert "a step with another card is over" in flow[1]
    assert "WARNING" not in flow[1]
    assert "failed" not in flow[1]


def test_outside_a_flow_cards_do_nothing() -> None:
    card = cards.DistillCard("nowhere")
    card.metrics({"loss": 1.0}, 1)
    card.progress(1, 2)
    cards.show_comparison([], [])


def test_a_page_is_updated_at_once_and_then_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(monkeypatch), Page(monkeypatch)
    card = cards.DistillCard("throttled")
    card.progress(0, 1000)
    assert shown.refreshed == 1
    for update in range(1, 1001):  # at 10 a second: 100 s
        clock.now += 0.1
        card.metrics({"loss": 1.0}, update)
        card.progress(update, 1000)
    assert shown.refreshed == pytest.approx(1 + 100 / cards.REFRESH_SECONDS, abs=1)


def test_time_left_counts_only_what_this_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, shown = Clock(monkeypatch), Page(monkeypatch)
    card = cards.DistillCard("resumed")
    card.progress(500, 1000)
    bar = shown.components[1]
    assert bar.render()["details"] == "just started"
    clock.now += 60
    card.progress(600, 1000)
    assert bar.render()["details"] == "4 min left"
    clock.now += 240
    card.progress(1000, 1000)
    assert bar.render()["details"] == "finished in 5 min"


def test_long_curves_are_thinned_evenly() -> None:
    curves = card_charts.Curves("losses")
    for update in range(10_000):
        curves.add(update, {"total": 1.0, "layers": 2.0})
    for series in ("total", "layers"):
        updates = [point["update"] for point in curves.spec["data"]["values"] if point["series"] == series]
        steps = {later - earlier for earlier, later in itertools.pairwise(updates)}
        assert len(steps) == 1, "a curve is drawn more densely in one part"
        assert card_charts.CURVE_POINTS <= len(updates) <= 2 * card_charts.CURVE_POINTS
        assert updates[0] == 0
        assert updates[-1] > 9_900


def test_a_loss_of_zero_has_a_linear_axis() -> None:
    curves = card_charts.Curves("losses", log=True)
    curves.add(1, {"total": 1.0})
    assert curves.spec["encoding"]["y"]["scale"]["type"] == "log"
    curves.add(2, {"total": 0.0})
    assert curves.spec["encoding"]["y"]["scale"]["type"] == "linear"
