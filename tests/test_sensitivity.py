"""Sensitivity: a layer that does nothing is the one to replace, one seed measures the same twice, a report is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distill import Stage, make_stage

from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import open_dataset, turns_of
from matvlm.distill import init_student
from matvlm.init import INITS
from matvlm.losses import dense_kl
from matvlm.models import hybrid, locate
from matvlm.models.layers import check_choice, choose_layers, least_sensitive
from matvlm.models.mixer import Mamba2Mixer
from matvlm.reporting import Reporter
from matvlm.sensitivity import SensitivityReport, choose_by_sensitivity, divergences, read_report, swapped
from matvlm.teacher import kept_logits

SETTINGS = {"updates": 6, "batch_size": 3, "held_out_samples": 4}
SILENT = 2
"""The layer of the tiny teacher whose attention answers nothing."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("sensitivity"))


@pytest.fixture(scope="module")
def teacher(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny teacher with the output projection of layer ``SILENT`` set to zero."""
    model, processor = locate.load(stage.teacher.uri)
    attention: Any = hybrid.decoder_layers(model)[SILENT].self_attn
    torch.nn.init.zeros_(attention.dense.weight)
    torch.nn.init.zeros_(attention.dense.bias)
    folder = tmp_path_factory.mktemp("silent") / "teacher"
    hybrid.save(model, processor, folder, {})
    return Checkpoint(uri=str(folder), label="teacher")


def recipe_of(stage: Stage, **sensitivity: Any) -> Recipe:
    fields = stage.recipe.model_dump()
    fields["hybrid"] |= {"layers": "sensitivity", "init": "aligned", "sensitivity": SETTINGS | sensitivity}
    return Recipe.model_validate(fields)


class Collected(Reporter):
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}
        self.files: list[str] = []

    def metrics(self, values: Any, step: int = 0) -> None:
        self.rows[step] = dict(values)

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(f"{folder}/{path.name}")


def batch_of(stage: Stage, rows: list[int], processor: Any) -> Batch:
    encoder, dataset = Encoder(processor), open_dataset(stage.data)
    chosen = [dataset[row] for row in rows]
    return encoder.collate([encoder.encode(row["id"], row["image"], turns_of(row)) for row in chosen])


def test_a_silent_layer_is_chosen_and_the_report_kept(stage: Stage, teacher: Checkpoint, tmp_path: Path) -> None:
    collected, recipe = Collected(), recipe_of(stage)
    report = choose_by_sensitivity(recipe, teacher, stage.data, tmp_path / "init", collected, "cpu")
    assert report.chosen == [SILENT]
    assert report.kl[SILENT] == pytest.approx(0.0, abs=1e-6)
    assert min(kl for layer, kl in enumerate(report.kl) if layer != SILENT) > 1e-3  # measured 0.0097 and more
    assert (report.updates, report.held_out_samples, report.aligned_samples) == (6, 4, 7)
    assert read_report(tmp_path / "init") == report
    assert collected.files == ["sensitivity/sensitivity.json"]
    assert collected.rows == {
        layer: {"sensitivity_kl": report.kl[layer], "alignment_error": report.alignment_error[layer]}
        for layer in range(4)
    }
    first, *rows = report.table().splitlines()
    assert first.split()[0] == "layer"
    assert rows[0].split()[0] == str(SILENT)
    assert [row.split()[-1] for row in rows] == ["yes", "no", "no", "no"]
    student = init_student(recipe, teacher, "paper", stage.data, tmp_path / "student", report.chosen)
    assert student.layers == [SILENT]
    assert set(hybrid.mixers(locate.load(student.uri)[0])) == {SILENT}


def test_the_same_seed_measures_the_same(stage: Stage, teacher: Checkpoint, tmp_path: Path) -> None:
    def measured(name: str, recipe: Recipe) -> SensitivityReport:
        torch.manual_seed(len(name))  # nothing may depend on the global generator
        return choose_by_sensitivity(recipe, teacher, stage.data, tmp_path / name, Reporter(), "cpu")

    recipe = recipe_of(stage, updates=2)
    first = measured("a", recipe)
    assert measured("other", recipe) == first
    assert measured("seed", recipe.model_copy(update={"seed": 4})).kl != first.kl


def test_held_out_samples_are_never_aligned_on(
    stage: Stage, teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[list[str]] = []
    collate = Encoder.collate

    def spy(self: Encoder, samples: Any) -> Batch:
        used.append([sample.id for sample in samples])
        return collate(self, samples)

    monkeypatch.setattr(Encoder, "collate", spy)
    choose_by_sensitivity(recipe_of(stage), teacher, stage.data, tmp_path, Reporter(), "cpu")
    held_out: list[str] = []
    while len(held_out) < 4:  # the last batches; before them those that calibrate and align the mixers
        held_out += used.pop()
    aligned = {id for batch in used for id in batch}
    assert len(held_out) == len(set(held_out)) == 4
    assert len(aligned) == 7
    assert not aligned & set(held_out)


def test_too_few_samples_are_refused(stage: Stage, teacher: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="held_out_samples is 11 and there are only 11 samples"):
        choose_by_sensitivity(recipe_of(stage, held_out_samples=11), teacher, stage.data, tmp_path, Reporter(), "cpu")


def test_divergence_is_that_of_the_hybrid(stage: Stage) -> None:
    """Per position over batches of unequal size, and every trial on its own."""
    model, processor = locate.load(stage.teacher.uri)
    batches = [batch_of(stage, rows, processor) for rows in ([0, 1, 2, 3], [4])]
    layers = hybrid.decoder_layers(model)
    attentions = [layer.self_attn for layer in layers]
    made = {layer: INITS["paper"](layers[layer].self_attn, layer, torch.Generator(), 8) for layer in (0, 2)}
    trials: dict[str, dict[int, Mamba2Mixer]] = {"none": {}, "first": {0: made[0]}, "both": made}
    found = divergences(model, trials, batches)
    assert [layer.self_attn for layer in layers] == attentions
    with torch.no_grad():
        expected = torch.cat([kept_logits(model, batch) for batch in batches])
        with swapped(model, made):
            hybrid_logits = torch.cat([kept_logits(model, batch) for batch in batches])
    assert found["none"] == 0.0
    assert found["both"] == pytest.approx(float(dense_kl(expected, hybrid_logits)) / len(expected), rel=1e-5)
    assert 0.01 < found["first"] != found["both"]


def test_swapped_puts_everything_back_after_an_error(stage: Stage) -> None:
    model, _ = locate.load(stage.teacher.uri)
    before = [layer.self_attn for layer in hybrid.decoder_layers(model)]
    with pytest.raises(TypeError), swapped(model, {1: torch.nn.Identity()}):
        model(input_ids=torch.tensor([[4, 5]]))  # an Identity cannot be called as attention is
    assert [layer.self_attn for layer in hybrid.decoder_layers(model)] == before


def test_least_sensitive_layers() -> None:
    assert least_sensitive([0.3, 0.1, 0.2, 0.1], 0.5) == [1, 3]
    assert least_sensitive([0.3, 0.1, 0.2, 0.1], 0.25) == [1]
    assert least_sensitive([2.0, float("inf"), 0.0, 1.0], 0.75) == [0, 2, 3]
    with pytest.raises(ValueError, match=r"layers \[1\] is NaN"):
        least_sensitive([0.3, float("nan"), 0.2, 0.1], 0.5)
    with pytest.raises(ValueError, match="replaces none of the 4 layers"):
        least_sensitive([0.3, 0.1, 0.2, 0.1], 0.1)


def test_the_rule_is_checked_before_and_measured_after() -> None:
    check_choice(8, 0.25, "sensitivity")
    check_choice(8, 0.25, "even")
    with pytest.raises(ValueError, match="replaces none of the 2 layers"):
        check_choice(2, 0.125, "sensitivity")
    with pytest.raises(ValueError, match=r"layers \[8\] do not exist"):
        check_choice(8, 0.25, [8])
    with pytest.raises(ValueError, match="sensitivity is measured on the model and its data: run init_hybrid"):
        choose_layers(8, 0.25, "sensitivity")
