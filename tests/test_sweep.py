"""Sweeps: what their file means, one point from start to end, and the results side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_profile
from flow_tools import DEBUG, FLOWS, run_flow
from test_plots import pixels_of, series_in
from tiny_distill import Stage, make_stage

from matvlm import plots
from matvlm.artifacts import TaskScore
from matvlm.config import Recipe
from matvlm.models import locate
from matvlm.recipes import RecipeError, load_recipe, parse_recipe
from matvlm.reporting import Reporter
from matvlm.sweep import PointResult, Summary, Sweep, SweepError, Trial, refuse_none, students_to_profile
from matvlm.sweep.running import Shared, remove_models, run_point, shared_stores
from matvlm.sweep.summary import groups, headline, notes, reference_kl, table, updates_to, write_summary
from matvlm.targets import Identity, content_settings

SWEEPS = sorted((FLOWS / "recipes" / "sweeps").glob("*.yaml"))
BASE = f"name: study\nrecipe: {DEBUG}\n"


def parse(text: str, *overrides: str, source: str = "studies/some.yaml") -> Sweep:
    return parse_recipe(text, source, overrides, kind=Sweep)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_parses(path: Path) -> None:
    sweep = parse(path.read_text(), source=str(path))
    assert sweep.description
    assert sweep.trials


def test_a_grid_is_every_combination_of_its_values_with_every_seed() -> None:
    grid = {"hybrid.ratio": [0.25, 0.5], "hybrid.init": ["aligned", "paper"], "distill.packing": [True]}
    sweep = parse(BASE + f"grid: {json.dumps(grid)}", "seeds=[3, 5]", "set={distill.max_updates: 4}")
    assert len(sweep.trials) == 8
    for trial, (ratio, init, seed) in zip(sweep.trials, product(*list(grid.values())[:2], [3, 5]), strict=True):
        assert (trial.name, trial.seed) == (f"{ratio}-{init}-true", seed)
        settings = [f"hybrid.ratio={ratio}", f"hybrid.init={init}", f"seed={seed}", "distill.packing=true"]
        assert trial.recipe == load_recipe(DEBUG, [*settings, "distill.max_updates=4"])


def test_a_named_point_has_seeds_and_changes_of_its_own() -> None:
    points = {
        "plain": {},
        "ramp": {"set": {"distill.loss.layer": {"from": 1.0, "to": 0.5, "updates": 3}}, "seeds": [7]},
        "section": {"set": {"distill": {"optimizer": {"lr": "1e-4"}, "epochs": 2}}},
    }
    plain, ramp, section = parse(BASE + f"points: {json.dumps(points)}").trials
    assert plain.recipe == load_recipe(DEBUG)
    assert plain.overrides == {}
    assert (ramp.seed, ramp.recipe.distill.loss.at(2.5).layer) == (7, 0.75)
    assert section.recipe == load_recipe(DEBUG, ["distill.optimizer.lr=1e-4", "distill.epochs=2"])
    assert section.overrides == {"distill.optimizer.lr": "1e-4", "distill.epochs": 2}


def test_the_base_is_found_beside_the_file_and_then_needed_no_more(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    base = tmp_path / "base.yaml"
    base.write_text(DEBUG.read_text())
    text = "name: study\nrecipe: ../base.yaml\npoints: {half: {set: {hybrid.ratio: 0.5}}}\nset: {seed: 4}"
    sweep = parse(text, source=str(tmp_path / "study" / "sweep.yaml"))
    base.unlink()
    again = Sweep.model_validate(json.loads(json.dumps(sweep.model_dump(mode="json"))))
    assert again == sweep
    assert again.trials == sweep.trials
    assert (again.recipe.seed, again.trials[0].seed) == (4, 0)


def test_initialisations_that_the_base_compares_are_left_to_the_points() -> None:
    recipe = FLOWS / "recipes" / "easyvqa.yaml"
    assert load_recipe(recipe).hybrid.compare_inits == ["random"]
    sweep = parse(f"name: study\nrecipe: {recipe}\ngrid: {{hybrid.init: [aligned, random]}}")
    assert [trial.recipe.hybrid.variants for trial in sweep.trials] == [["aligned"], ["random"]]


WRONG = {
    "no points": ("", "points: a sweep needs points, a grid or both"),
    "value": ("points: {a: {set: {hybrid.init: papr}}}", "point a: hybrid.init: Input should be"),
    "field": ("points: {a: {set: {hybrid.ini: paper}}}", "point a: hybrid.ini: unknown key"),
    "nested value": ("points: {a: {set: {distill.loss.prob: -1}}}", "point a: distill.loss.prob: Input should be"),
    "no section": ("points: {a: {set: {hybrid.init.x: 1}}}", "point a: hybrid.init.x: 'init' is not a section"),
    "combination": ("points: {a: {set: {distill.batch_size: 6}}}", "point a: distill: batch_size 6 must be a multiple"),
    "value in a grid": ("grid: {hybrid.init: [aligned, papr]}", "point papr: hybrid.init: Input should be"),
    "empty grid": ("grid: {hybrid.init: []}", "grid.hybrid.init: List should have at least 1 item"),
    "same name": ("grid: {hybrid.init: [paper]}\npoints: {paper: {}}", "point paper: there are two of that name"),
    "reserved name": ("points: {teacher: {}}", "point teacher: that name means something else"),
    "no file name": ("points: {a/b: {}}", "String should match pattern"),
    "data": (
        "points: {a: {set: {data.max_samples: 5}}}",
        "point a: data.max_samples: points differ in hybrid, distill",
    ),
    "all data": ("points: {a: {set: {data: {max_samples: 5}}}}", "point a: data: points differ in hybrid, distill"),
    "teacher": ("points: {a: {set: {teacher.dtype: bfloat16}}}", "point a: teacher.dtype: points differ in"),
    "resources": ("points: {a: {set: {resources.cpu: 2}}}", "point a: resources.cpu: points differ in"),
    "tasks": ("points: {a: {set: {evaluate.limit: 2}}}", "point a: evaluate.limit: points differ in"),
    "seed": ("points: {a: {set: {seed: 1}}}", "point a: seed: give seeds"),
    "seeds": ("points: {a: {seeds: [1, 1]}}", "points.a.seeds: every seed once, got [1, 1]"),
    "validation": ("points: {a: {set: {distill.validation.samples: 2}}}", "point a: distill.validation: points are"),
    "comparisons": (
        "points: {a: {set: {hybrid.compare_inits: [paper]}}}",
        "point a: hybrid.compare_inits: a point has",
    ),
    "reference": ("points: {a: {}}\nreference: b", "reference: 'b' is no point; there are a"),
    "nodes": ("points: {a: {}}\nset: {resources.nodes: 2}", "recipe.resources.nodes: a point runs on one node"),
    "set": ("points: {a: {}}\nset: {distill.bach: 1}", "debug.yaml, with set: distill.bach: unknown key"),
    "unknown key": ("points: {a: {}}\nrecipes: {}", "recipes: unknown key"),
    "base": ("points: {a: {}}\nrecipe: nowhere.yaml", "recipe: studies/nowhere.yaml: cannot read the recipe"),
    "inline base": ("points: {a: {}}\nrecipe: {name: x, distill: {bach: 1}}", "recipe: distill.bach: unknown key"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_with_file_point_and_field(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(BASE + text)
    (line,) = str(caught.value).splitlines()
    assert line.startswith("studies/some.yaml: ")
    assert message in line


def test_layers_that_the_teacher_lacks_are_refused_before_any_step(tmp_path: Path) -> None:
    words = ("--config", "recipe", str(SWEEPS[0]), "run", "--set", "points.paper.set.hybrid.layers=[9]")
    code, output = run_flow(tmp_path, *words, flow="sweep_flow.py")
    assert code != 0
    assert output.strip() == (
        f"{SWEEPS[0]}: point paper: hybrid: layers [9] do not exist: the model has layers 0 to 7 "
        "(teacher: package://easyvqa-teacher)"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_points_share_a_target_store_exactly_when_it_is_the_same() -> None:
    points = {
        "a": {"seeds": [0, 1]},
        "b": {"set": {"hybrid.init": "paper", "targets.shards": 3, "distill.loss.targets": "online"}},
        "warm": {"set": {"distill.loss.temperature": 2.0}},
        "drawn": {"set": {"targets.scheme": "topk_sampled"}, "seeds": [0, 1]},
        "all": {"set": {"targets.positions": "all"}},
    }
    trials = parse(BASE + f"points: {json.dumps(points)}").trials
    found = shared_stores(trials)
    assert found == [["a-0", "a-1", "b-0"], ["warm-0"], ["drawn-0"], ["drawn-1"], ["all-0"]]
    recipes = {trial.key: trial.recipe for trial in trials}
    same = {"teacher": "t", "data": "d", "template": "x"}
    for one, other in product(recipes, repeat=2):
        together = any({one, other} <= set(keys) for keys in found)
        identities = [Identity(**same, **content_settings(recipes[key])) for key in (one, other)]
        assert (identities[0] == identities[1]) == together


def test_the_first_of_each_number_of_mixers_is_profiled() -> None:
    text = (
        "grid: {hybrid.ratio: [0.25, 0.5], hybrid.init: [aligned, paper]}\npoints: {one: {set: {hybrid.layers: [3]}}}"
    )
    assert parse(BASE + text).first_of_each_size(8) == ["0.25-aligned-0", "0.5-aligned-0", "one-0"]


class Log(Reporter):
    """Remembers what it hears; raises at the metrics of update ``stop``, unless ``stop`` is 0."""

    def __init__(self, stop: int = 0):
        self.stop, self.values, self.files = stop, dict[str, float](), list[str]()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        if step and step == self.stop and "lr" in values:
            raise InterruptedError("stopped")
        self.values |= values

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(path.name)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


def tiny_trial(stage: Stage) -> Trial:
    recipe = stage.but(validation={"samples": 3, "every_updates": 2}).model_dump()
    recipe["evaluate"] = {"limit": 4}
    return Trial("tiny", 3, {}, Recipe.model_validate(recipe))


def run(stage: Stage, folder: Path, reporter: Reporter) -> PointResult:
    return run_point(tiny_trial(stage), Shared(stage.teacher, stage.data, stage.targets), folder, reporter, "cpu")


@pytest.fixture(scope="module")
def finished(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[PointResult, Path, Log]:
    folder, log = tmp_path_factory.mktemp("point"), Log()
    return run(stage, folder, log), folder, log


def test_a_point_is_made_distilled_and_evaluated(finished: tuple[PointResult, Path, Log]) -> None:
    result, _, log = finished
    assert result.layers == [0, 2]
    assert [update for update, _ in result.curve] == [0, 2, 4]
    assert result.final_kl == result.curve[-1][1] == log.values["final_kl"] == log.values["validation/loss_prob"]
    assert result.updates == 4
    assert result.continued_from == 0
    assert result.seconds.keys() == {"init", "distill", "evaluate"}
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert 1e7 < result.peak_memory_bytes < 6e9
    assert result.metrics["easyvqa/accuracy"] == pytest.approx(result.scores["easyvqa"].value / 100)
    assert result.student is not None
    model, _ = locate.load(result.student.uri)
    trained = [name for name, _ in model.named_parameters() if ".self_attn.A_log" in name]
    assert len(trained) == 2
    assert PointResult.model_validate_json(result.model_dump_json()) == result


def test_what_is_finished_is_not_done_again(stage: Stage, finished: tuple[PointResult, Path, Log]) -> None:
    result, folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(stage, folder, Log()) == result
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_an_interrupted_point_goes_on_from_its_snapshot(
    stage: Stage, finished: tuple[PointResult, Path, Log], tmp_path: Path
) -> None:
    log = Log(stop=3)
    with pytest.raises(InterruptedError):
        run(stage, tmp_path, log)
    assert log.files == ["error.txt"]
    assert "InterruptedError: stopped" in (tmp_path / "error.txt").read_text()
    result, whole = run(stage, tmp_path, Log()), finished[0]
    assert result.continued_from == 2
    assert result.curve == whole.curve
    assert result.metrics == whole.metrics


def test_models_are_removed_but_for_those_that_are_profiled(stage: Stage, tmp_path: Path) -> None:
    result = run(stage, tmp_path, Log())
    trial = tiny_trial(stage)
    kept = remove_models(result, trial, tmp_path, keep_student=True)
    assert kept == result
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"model", "evaluation"}
    gone = remove_models(result, trial, tmp_path, keep_student=False)
    assert gone.student is None
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"evaluation"}
    assert run(stage, tmp_path, Log()) == gone


def made_up(name: str, seed: int | None = 0, score: float = 90.0, kl: float = 0.1, **fields: Any) -> PointResult:
    """A point whose divergence falls to ``kl`` in 40 updates."""
    values = {
        "overrides": {"hybrid.init": name},
        "layers": [0, 4],
        "updates": 40,
        "seconds": {"init": 1.0, "distill": 20.0 + (seed or 0), "evaluate": 2.0},
        "peak_memory_bytes": 2_500_000_000,
        "machine": "Loom 9000",
        "curve": [(update, kl * (1 + (40 - update) / 10)) for update in (0, 10, 20, 30, 40)],
        "final_kl": kl,
        "metrics": {"easyvqa/accuracy": score / 100},
        "scores": {"easyvqa": TaskScore(metric="accuracy", value=score)},
    }
    return PointResult.model_validate({"name": name, "seed": seed, **values, **fields})


TEACHER_RESULT = made_up("teacher", None, score=96.0, overrides={}, layers=[], curve=[], final_kl=None, seconds={})
SPEED = tiny_profile.result(
    tiny_profile.point("teacher", decode=[50.0], kv=2**21), tiny_profile.point("a", decode=[80.0], kv=2**20)
)


def summary_of(*points: PointResult, reference: str | None = "b", teacher: PointResult = TEACHER_RESULT) -> Summary:
    return Summary(
        sweep={"reference": reference},
        environment={"machine": "Loom 9000"},
        teacher=teacher,
        points=list(points),
        profile=SPEED,
    )


def cells(summary: Summary) -> list[dict[str, str]]:
    """The rows of the table by heading; all have as many cells as there are headings."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(summary).splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", cell)]


def test_the_table_has_the_teacher_and_then_each_point_over_its_seeds() -> None:
    found = [made_up("a", seed, score=80.0 + seed, kl=0.1 * (seed + 1)) for seed in (0, 1, 4)]
    rows = cells(summary_of(*found, made_up("b")))
    assert [row["point"] for row in rows] == ["teacher", "a", "b"]
    teacher, a, b = rows
    assert (teacher["layers"], teacher["easyvqa: of the teacher's"], teacher["KL [nats]"]) == ("0", "100.0%", "-")
    assert a["differs from the base in"] == "hybrid.init=a"
    scores = [result.scores["easyvqa"].value for result in found]
    assert numbers(a["easyvqa"]) == pytest.approx([sum(scores) / 3, min(scores), max(scores)], abs=0.01)
    assert numbers(a["easyvqa: of the teacher's"])[0] == pytest.approx(100 * sum(scores) / 3 / 96, abs=0.1)
    assert numbers(a["KL [nats]"]) == pytest.approx([0.8 / 3, 0.1, 0.5], abs=1e-4)
    assert numbers(b["distillation [s]"]) == [20.0]
    assert numbers(b["memory [GB]"]) == [2.5]


def test_updates_to_the_reference_are_those_of_the_first_value_at_or_below_it() -> None:
    fast, slow = made_up("a", kl=0.05), made_up("c", kl=0.2)
    mixed = [made_up("d", 0, kl=0.05), made_up("d", 1, kl=0.2)]
    summary = summary_of(made_up("b", kl=0.1), fast, slow, *mixed)
    assert reference_kl(summary) == 0.1
    column = {row["point"]: row["updates to b's KL"] for row in cells(summary)}
    assert column == {"teacher": "-", "b": "40", "a": "30", "c": "-", "d": "30, 1 of 2 seeds"}
    assert "updates to b's KL" not in cells(summary_of(fast, reference=None))[0]
    for goal in (0.04, 0.05, 0.06, 0.1, 0.25, 1.0):
        reached = [update for update, value in fast.curve if value <= goal]
        assert updates_to(fast.curve, goal) == (min(reached) if reached else None)


def test_a_failure_is_told_in_its_row_and_counts_in_no_mean() -> None:
    error = "loss is not\nfinite | 11 updates skipped"
    broken = PointResult(name="a", seed=1, overrides={"hybrid.init": "a"}, error=error)
    partly = made_up("b", failed_tasks={"pope": "no such folder"})
    summary = summary_of(made_up("a", 0, score=80.0), broken, partly, PointResult(name="c", seed=0, error="no memory"))
    teacher, a, b, c = cells(summary)
    assert a["failed"] == "seed 1: loss is not finite / 11 updates skipped"
    assert numbers(a["easyvqa"]) == [80.0]
    assert numbers(a["memory [GB]"]) == [2.5]
    assert (b["failed"], teacher["failed"], c["failed"]) == ("pope: no such folder", "", "no memory")
    assert {c[name] for name in c if name not in ("point", "failed")} == {"-"}
    assert headline(summary)["failed_points"] == 2
    assert "failed" not in cells(summary_of(made_up("a")))[0]


def test_perplexities_have_columns_and_reach_mlflow_with_the_other_means() -> None:
    metric = "python_docs/word_perplexity"
    found = [made_up("b", seed, kl=0.1 + seed, metrics={metric: 20.0 + seed, "python_docs/x": 1.0}) for seed in (0, 2)]
    rows = cells(summary_of(*found))
    assert rows[0][metric] == "-"
    assert numbers(rows[1][metric]) == [21.0, 20.0, 22.0]
    assert "python_docs/x" not in rows[1]
    wanted = {f"b/{metric}": 21.0, "b/final_kl": 1.1, "b/score/easyvqa": 90.0, "teacher/score/easyvqa": 96.0}
    values = headline(summary_of(*found))
    assert {name: values[name] for name in wanted} == pytest.approx(wanted)
    assert values["b/seconds/distill"] == 21.0


def test_the_notes_say_what_does_not_compare() -> None:
    plain, continued = made_up("a"), made_up("b", 2, continued_from=30)
    assert "does not compare" not in notes(summary_of(plain))
    assert "does not compare" in notes(summary_of(plain, made_up("c", overrides={"targets.top_k": 8})))
    assert "does not compare" in notes(summary_of(made_up("c", overrides={"distill.loss.temperature": 2.0})))
    assert "b, seed 2 (from update 30)" in notes(summary_of(plain, continued))


def test_a_summary_is_written_whole_and_kept(tmp_path: Path) -> None:
    summary, log = summary_of(made_up("a"), made_up("b", 0), made_up("b", 1)), Log()
    write_summary(summary, tmp_path, log)
    assert log.files == ["summary.json", "summary.md", "curves.png", "tradeoff.png"]
    assert Summary.model_validate_json((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "summary.md").read_text().startswith(table(summary))
    assert log.values == headline(summary)
    assert list(groups(summary)) == ["teacher", "a", "b"]


def test_what_cannot_be_drawn_is_left_out(tmp_path: Path) -> None:
    """No validation, and no model that has both a score and a speed."""
    teacher = made_up("teacher", None, scores={}, curve=[], final_kl=None)
    log = Log()
    write_summary(summary_of(made_up("b", curve=[], final_kl=None), teacher=teacher), tmp_path, log)
    assert log.files == ["summary.json", "summary.md"]


def test_curves_have_a_colour_for_each_point_and_fall_as_the_values_do(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    curves = {
        "none": [[]],
        "one": [[(0, 2.0), (10, 1.0), (20, 0.5)]],
        "two": [[(0, 4.0), (10, 3.0), (20, 2.9)], [(0, 6.0), (10, 5.0)]],
    }
    plots.validation_curves(curves, path)
    assert series_in(path) == [0, 1]
    line = pixels_of(path, plots.COLOURS[0])
    rows, columns = line.nonzero()
    inside = columns < line.shape[1] * 0.7  # the legend is at the right
    first, last = columns[inside] < columns.min() + 20, columns[inside] > columns[inside].max() - 20
    assert rows[inside][first].mean() < rows[inside][last].mean() - 50
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.validation_curves({"none": [[]]}, path)


def test_faster_is_right_smaller_is_left_and_better_is_up(tmp_path: Path) -> None:
    path = tmp_path / "tradeoff.png"
    plots.tradeoff({"teacher": 60.0, "a": 90.0, "unmeasured": 99.0}, SPEED, path)
    assert series_in(path) == [0, 1]
    speed, memory = zip(
        *[np.array_split(pixels_of(path, colour), 2, axis=1) for colour in plots.COLOURS[:2]], strict=True
    )
    teacher, student = (panel.nonzero()[1].max() for panel in speed)  # the legend is at the left
    assert student > teacher + 50
    teacher, student = (panel.nonzero() for panel in memory)
    assert student[1].max() < teacher[1].min() - 50
    assert student[0].max() < teacher[0].min() - 50
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.tradeoff({"unmeasured": 99.0}, SPEED, path)


def test_a_sweep_without_a_result_is_an_error_that_names_each_failure() -> None:
    broken = [PointResult(name=name, seed=1, error=f"{name} broke") for name in ("a", "b")]
    with pytest.raises(SweepError) as caught:
        refuse_none(broken)
    assert str(caught.value).splitlines()[1:] == ["a, seed 1: a broke", "b, seed 1: b broke"]
    refuse_none([*broken, made_up("c")])


def test_a_student_of_each_size_that_is_there_is_profiled() -> None:
    def student(name: str, layers: list[int]) -> PointResult:
        return made_up(name, layers=layers, student={"uri": name, "label": name})

    results = [PointResult(name="x", error="broke"), made_up("gone", layers=[1]), student("a", [1]), student("b", [2])]
    assert [model.label for model in students_to_profile([*results, student("c", [1, 2])])] == ["a", "c"]
