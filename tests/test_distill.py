"""Distillation: losses and updates are what they say, and a stopped run goes on as if it had not been stopped."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_distill import NUM_SAMPLES, REPLACED, Kept, Stage, batch_of, is_mixers, make_stage

from matvlm.artifacts import Checkpoint
from matvlm.config import Recipe, Schedule
from matvlm.data.held_out import split
from matvlm.data.prepare import open_dataset
from matvlm.distill import DistillError, init_student
from matvlm.distill.schedule import learning_rate, num_updates, order
from matvlm.distill.trunk import SharedTrunk, TeacherForced
from matvlm.losses import dense_kl
from matvlm.models import hybrid, locate
from matvlm.snapshots import SnapshotError
from matvlm.storage import StorageError
from matvlm.targets import TargetError, TargetReader
from matvlm.teacher import kept_logits

TINY_DISK_MIB = 2


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def whole(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Kept]:
    """The uninterrupted run that others are compared with."""
    kept = Kept()
    torch.manual_seed(1)
    return stage.run(tmp_path_factory.mktemp("whole"), kept), kept


def weights(checkpoint: Checkpoint) -> bytes:
    return (Path(checkpoint.uri) / "model.safetensors").read_bytes()


def stop() -> None:
    raise KeyboardInterrupt


# The schedule


def test_every_sample_comes_once_an_epoch() -> None:
    epochs = [[order(11, 4, 5, update) for update in range(1 + 3 * epoch, 4 + 3 * epoch)] for epoch in range(3)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [4, 4, 3]
        assert sorted(row for rows in epoch for row in rows) == list(range(11))
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(11, 4, 6, 1) != order(11, 4, 5, 1)
    np.random.seed(0)
    assert [order(11, 4, 5, update) for update in (9, 2)] == [epochs[2][2], epochs[0][1]]
    assert sorted(order(3, 8, 0, 2)) == [0, 1, 2]


def test_number_of_updates(stage: Stage) -> None:
    assert num_updates(stage.recipe.distill, 11) == 6
    assert num_updates(stage.recipe.distill, 12) == 6
    assert num_updates(stage.recipe.distill, 13) == 8
    assert num_updates(stage.but(max_updates=5).distill, 11) == 5
    assert num_updates(stage.but(max_updates=500).distill, 11) == 6


def test_learning_rate_by_hand() -> None:
    schedule = Schedule(warmup_updates=4, decay_updates=5, final_lr_share=0.2)
    rates = [learning_rate(2.0, schedule, update, 12) for update in range(1, 13)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 1.68, 1.36, 1.04, 0.72, 0.4])
    assert [learning_rate(2.0, Schedule(), update, 3) for update in (1, 2, 3)] == [2.0] * 3
    short = Schedule(warmup_updates=4, decay_updates=4)
    assert [learning_rate(1.0, short, update, 4) for update in (1, 2, 3, 4)] == [0.25, 0.5, 0.25, 0.0]


def test_learning_rate_of_a_cosine_by_hand() -> None:
    """After two updates of warm-up six of the cosine, of 0, 30, 60, ... 180 degrees."""
    schedule = Schedule(shape="cosine", warmup_updates=2, final_lr_share=0.2)
    rates = [learning_rate(2.0, schedule, update, 8) for update in range(1, 9)]
    root = 0.75**0.5
    assert rates == pytest.approx([1.0, 2.0, 1.2 + 0.8 * root, 1.6, 1.2, 0.8, 1.2 - 0.8 * root, 0.4])
    to_nothing = Schedule(shape="cosine")
    rates = [learning_rate(1.0, to_nothing, update, 4) for update in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0.0])
    assert [learning_rate(1.0, schedule, update, 2) for update in (1, 2)] == [0.5, 1.0]


# Updates


def test_losses_by_hand(stage: Stage, whole: tuple[Checkpoint, Kept]) -> None:
    """The first update's, from whole logits and one sample at a time; the targets on disk are float16."""
    student, _ = locate.load(stage.student.uri)
    teacher, _ = locate.load(stage.teacher.uri)
    rows, loss = order(NUM_SAMPLES, 4, stage.recipe.seed, 1), stage.recipe.distill.loss
    prob = ce = layer = torch.zeros(())
    positions = tokens = 0
    with torch.no_grad():
        trunk = SharedTrunk(student, locate.load(stage.teacher.uri)[0])
        for row in rows:
            batch = batch_of(stage, [row])
            kept, labels = batch.kept[0], batch.labels[0]
            mine, theirs = (model(**batch.inputs).logits[0][kept] for model in (student, teacher))
            prob = prob + dense_kl(theirs / loss.temperature, mine / loss.temperature)
            answers = labels[labels != -100]
            ce = ce - mine.log_softmax(-1)[torch.arange(len(answers)), answers].sum()
            layer = layer + TeacherForced(trunk, batch, "l2").value()
            positions, tokens = positions + len(answers), tokens + len(labels)
    seen = whole[1].seen[1]
    # Measured: 2e-5, 2e-8 and 5e-8 apart.
    assert seen["loss_prob"] == pytest.approx(loss.prob * float(prob) / positions, rel=1e-3)
    assert seen["loss_ce"] == pytest.approx(loss.ce * float(ce) / positions, rel=1e-5)
    assert seen["loss_layer"] == pytest.approx(loss.layer * float(layer) / tokens, rel=1e-5)
    assert seen["loss"] == pytest.approx(seen["loss_prob"] + seen["loss_ce"] + seen["loss_layer"])
    assert seen["lr"] == pytest.approx(0.5e-2)
    assert all(seen[name] > 1e-3 for name in ("loss_prob", "loss_ce", "loss_layer")), "every term is tested"


def test_only_what_is_trained_changes(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    before = load_file(Path(stage.student.uri) / "model.safetensors")

    def changed(checkpoint: Checkpoint) -> set[str]:
        after = load_file(Path(checkpoint.uri) / "model.safetensors")
        assert before.keys() == after.keys()
        return {name for name in before if not torch.equal(before[name], after[name])}

    checkpoint, _ = whole
    mixers, connector = {n for n in before if is_mixers(n)}, {n for n in before if "multi_modal_projector" in n}
    assert len(mixers) > 10
    assert len(connector) == 4
    assert changed(checkpoint) == mixers | connector
    assert checkpoint.trained_parameters == sum(before[name].numel() for name in mixers | connector)
    assert (checkpoint.updates, checkpoint.init, checkpoint.layers) == (6, "paper", REPLACED)
    section = json.loads((Path(checkpoint.uri) / "config.json").read_text())["matvlm"]["provenance"]
    assert (section["updates"], section["recipe"]["seed"]) == (6, 3)
    assert changed(stage.run(tmp_path, recipe=stage.but(train_connector=False, max_updates=1))) == mixers


def test_the_teacher_itself_says_what_its_targets_say(
    stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store holds every token here, so only its float16 is between the two."""
    monkeypatch.delattr(TargetReader, "lookup")
    kept = Kept()
    stage.run(tmp_path, kept, recipe=stage.but(max_updates=1, loss={"targets": "online"}))
    # Measured: 2e-5 apart (loss_prob), not at all (the others).
    assert kept.seen[1]["loss_prob"] == pytest.approx(whole[1].seen[1]["loss_prob"], rel=1e-3)
    for name in ("loss_ce", "loss_layer"):
        assert kept.seen[1][name] == pytest.approx(whole[1].seen[1][name], rel=1e-5)


def test_scaling_of_the_paper(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    kept = Kept()
    stage.run(tmp_path, kept, recipe=stage.but(max_updates=1, loss={"scaling": "paper"}))
    batch = batch_of(stage, order(NUM_SAMPLES, 4, stage.recipe.seed, 1))
    positions, tokens = int(batch.kept.sum()), int(batch.inputs["attention_mask"].sum())
    assert 4 < positions < tokens
    for name, count in (("loss_prob", positions), ("loss_ce", positions), ("loss_layer", tokens)):
        assert kept.seen[1][name] == pytest.approx(whole[1].seen[1][name] * count / 4, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        {"layer_inputs": "teacher_forced"},
        {"layer_inputs": "student_forced"},
        {"divergence": "reverse_kl", "ce_teacher": 0.5, "layer_form": "cosine"},
        {"divergence": "jsd", "targets": "online", "logits_l2": 0.1, "layer_inputs": "student_forced"},
        {"divergence": "kl", "targets": "online", "ce_teacher": 0.5, "layer_form": "cosine", "scaling": "paper"},
    ],
    ids=lambda loss: ",".join(map(str, loss.values())),
)
def test_micro_batches_do_not_matter(stage: Stage, tmp_path: Path, loss: dict[str, Any]) -> None:
    """One update of eight samples, 1 x 8, 2 x 4 and 8 x 1: they are padded and summed differently, no more."""
    found = []
    for size in (8, 4, 1):
        kept = Kept()
        change = {"batch_size": 8, "micro_batch_size": size, "max_updates": 2, "loss": loss}
        checkpoint = stage.run(tmp_path / str(size), kept, recipe=stage.but(**change))
        found.append((load_file(Path(checkpoint.uri) / "model.safetensors"), kept.seen))
    (first, seen), *others = found
    for other, also_seen in others:
        for update in (1, 2):
            assert also_seen[update] == pytest.approx(seen[update], rel=1e-5)  # measured: 2e-7
        # Adam's first steps are of the learning rate's size whatever the gradient's; measured: 5e-6 after
        # two of them.
        assert max(float((first[name] - other[name]).abs().max()) for name in first) < 5e-5


@pytest.mark.parametrize(
    ("choice", "layer_inputs"),
    [("mixers", "teacher_forced"), ("mixers", "student_forced"), ("layers", "teacher_forced")],
)
def test_what_is_computed_anew_is_the_same(stage: Stage, tmp_path: Path, choice: str, layer_inputs: str) -> None:
    seen = []
    for checkpointing in ("none", choice):
        kept = Kept()
        change = {"activation_checkpointing": checkpointing, "loss": {"layer_inputs": layer_inputs}, "max_updates": 3}
        stage.run(tmp_path / checkpointing, kept, recipe=stage.but(**change))
        seen.append(kept.seen)
    assert seen[0] == seen[1]


def test_packed_samples_learn_the_same(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    kept = Kept()
    stage.run(tmp_path, kept, recipe=stage.but(packing=True))
    for update, values in whole[1].seen.items():
        assert kept.seen[update] == pytest.approx(values, rel=1e-4)  # measured: 3e-6


@pytest.mark.slow
@pytest.mark.parametrize("layer_inputs", ["teacher_forced", "student_forced"])
def test_compiled_layers_learn_the_same(stage: Stage, tmp_path: Path, layer_inputs: str) -> None:
    """In micro-batches of 2 and 1 samples, each compiled for itself; mixers are computed anew."""
    seen = []
    for compiled in (False, True):
        kept = Kept()
        change = {"compile": compiled, "activation_checkpointing": "mixers", "loss": {"layer_inputs": layer_inputs}}
        stage.run(tmp_path / str(compiled), kept, recipe=stage.but(**change))
        seen.append(kept.seen)
    for update, values in seen[0].items():
        assert seen[1][update] == pytest.approx(values, rel=1e-4)  # measured: 1e-6


def test_half_precision_teacher_float32_mixers(tmp_path: Path) -> None:
    half = make_stage(tmp_path / "stage", "bfloat16", "bfloat16")
    kept = Kept()
    checkpoint = half.run(tmp_path / "run", kept, recipe=half.but(optimizer={"lr": 1e-4}))
    state = torch.load(tmp_path / "run/snapshots/update-000004/state.pt", weights_only=True)["engine"]
    assert {value.dtype for entry in state.values() for value in entry.values()} == {torch.float32}
    saved = load_file(Path(checkpoint.uri) / "model.safetensors")
    trained = {name for name in saved if is_mixers(name) or "multi_modal_projector" in name}
    assert len(trained) == len(state)
    assert {name for name, value in saved.items() if value.dtype == torch.float32} == trained
    assert {value.dtype for name, value in saved.items() if name not in trained} == {torch.bfloat16}
    # Steps of 1e-4 on weights of a size around 0.1 would all be lost in bfloat16, whose steps there are 5e-4.
    before = load_file(Path(half.student.uri) / "model.safetensors")
    moved = {name: (saved[name] - before[name].float()).abs().mean() for name in trained}
    assert all(1e-6 < float(distance) < 6e-4 for distance in moved.values()), moved
    assert all(math.isfinite(value) for values in kept.seen.values() for value in values.values())
    model, _ = locate.load(checkpoint.uri, dtype=None)
    assert sorted(hybrid.mixers(model)) == REPLACED


# Going on


def test_a_continued_run_equals_an_uninterrupted_one(
    stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path
) -> None:
    checkpoint, uninterrupted = whole
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path, Kept(at=5, then=stop))
    assert sorted(os.listdir(tmp_path / "snapshots")) == ["update-000002", "update-000004"]
    kept = Kept()
    torch.manual_seed(2)
    np.random.seed(2)
    random.seed(2)
    continued = stage.run(tmp_path, kept)
    assert kept.computed == [5, 6]
    assert kept.seen == uninterrupted.seen
    assert weights(continued) == weights(checkpoint)
    assert (tmp_path / "loss_curves.png").read_bytes() == Path(checkpoint.uri, "../loss_curves.png").read_bytes()
    assert continued == checkpoint.model_copy(update={"uri": continued.uri})
    assert len({values["loss"] for values in uninterrupted.seen.values()}) == 6


def test_a_damaged_snapshot_costs_only_time(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path, Kept(at=5, then=stop))
    os.truncate(tmp_path / "snapshots/update-000004/state.pt", 1000)
    kept = Kept()
    assert weights(stage.run(tmp_path, kept)) == weights(whole[0])
    assert kept.computed == [3, 4, 5, 6]


def test_a_full_disk_leaves_the_snapshot_before(stage: Stage, whole: tuple[Checkpoint, Kept], tiny_disk: Path) -> None:
    others = tiny_disk / "others"

    def fill() -> None:
        with suppress(OSError), others.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with pytest.raises(StorageError, match=r"update-000004: cannot write: .*make room or use another folder"):
        stage.run(tiny_disk / "run", Kept(at=3, then=fill))
    assert os.listdir(tiny_disk / "run/snapshots") == ["update-000002"]
    others.unlink()
    kept = Kept()
    assert weights(stage.run(tiny_disk / "run", kept)) == weights(whole[0])
    assert min(kept.computed) == 3


def test_a_killed_process_can_be_continued(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    """SIGKILL at a random moment behind the first snapshot, which may well be while another one is written."""
    call = stage._asdict() | {"recipe": stage.but(checkpoint_every_updates=1, epochs=10)}
    given = {name: value.model_dump(mode="json") for name, value in call.items()}
    (tmp_path / "call.json").write_text(json.dumps(given))
    code = (
        "import json, sys, torch; from pathlib import Path;"
        "from matvlm.artifacts import *; from matvlm.config import *;"
        "from matvlm.distill import distill; from matvlm.reporting import Reporter; torch.set_num_threads(1);"
        "kinds = dict(recipe=Recipe, student=Checkpoint, teacher=Checkpoint, data=DataManifest, targets=TargetStore);"
        "given = json.load(open(sys.argv[1]));"
        "distill(**{n: kinds[n].model_validate(v) for n, v in given.items()}, folder=Path(sys.argv[2]),"
        " reporter=Reporter(), device='cpu')"
    )
    folder = tmp_path / "run"
    command = [sys.executable, "-c", code, str(tmp_path / "call.json"), str(folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    while not (folder / "snapshots/update-000001").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 0.5))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    reached = max(int(name[-6:]) for name in os.listdir(folder / "snapshots") if name.startswith("update-"))
    kept = Kept()
    continued = stage.run(folder, kept, recipe=call["recipe"])
    assert min(kept.computed) == reached + 1
    assert max(kept.computed) == 30
    uninterrupted = stage.run(tmp_path / "whole", recipe=stage.but(epochs=10))
    assert weights(continued) == weights(uninterrupted) != weights(whole[0])


def test_a_finished_run_is_returned_as_it_is(stage: Stage, tmp_path: Path) -> None:
    recipe = stage.but(max_updates=1)
    checkpoint = stage.run(tmp_path, recipe=recipe)
    shutil.rmtree(tmp_path / "model")
    gone = {"student": stage.student.model_copy(update={"uri": str(tmp_path / "gone")})}
    kept = Kept()
    again = stage.run(tmp_path, kept, recipe=stage.but(max_updates=1, log_every_updates=7), **gone)
    assert again == checkpoint
    assert kept.seen == {}
    assert not (tmp_path / "model").exists(), "no work was done"
    with pytest.raises(SnapshotError, match=r"checkpoint\.json: seed was 3 in the finished run there and is 4 in this"):
        stage.run(tmp_path, recipe=recipe.model_copy(update={"seed": 4}))
    for content in ("[]", "{}", json.dumps(checkpoint.model_dump())):
        (tmp_path / "checkpoint.json").write_text(content)
        with pytest.raises(SnapshotError, match=r"checkpoint\.json: not the record of a finished distillation"):
            stage.run(tmp_path, recipe=recipe)


def test_smaller_micro_batches_continue_a_run(stage: Stage, whole: tuple[Checkpoint, Kept], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path, Kept(at=5, then=stop))
    kept = Kept()
    stage.run(tmp_path, kept, recipe=stage.but(micro_batch_size=1))
    assert kept.computed == [5, 6]
    assert kept.seen[6] == pytest.approx(whole[1].seen[6], rel=1e-5)  # measured: 1e-7


# Refusals


def test_snapshots_of_another_run_are_refused(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path, Kept(at=3, then=stop))
    other = init_student(stage.recipe, stage.teacher, "random", stage.data, tmp_path / "other")
    cases: list[tuple[str, Recipe | None, dict[str, Any]]] = [
        (r"distill\.optimizer\.lr is 0\.01 in the snapshot and 0\.02", stage.but(optimizer={"lr": 0.02}), {}),
        (r"distill\.loss\.ce is 0\.25 in the snapshot and 0\.0", stage.but(loss={"ce": 0.0}), {}),
        (r"seed is 3 in the snapshot and 4", stage.recipe.model_copy(update={"seed": 4}), {}),
        (r"init is 'paper' in the snapshot and 'random'", None, {"student": other}),
        (r"student is '\w+' in the snapshot and", None, {"student": other.model_copy(update={"init": "paper"})}),
    ]
    for complaint, recipe, given in cases:
        with pytest.raises(SnapshotError, match=rf"update-000002: {complaint}.*use the recipe it was made with"):
            stage.run(tmp_path, recipe=recipe, **given)
    free = {"engine": "auto", "log_every_updates": 3, "checkpoint_every_updates": 5, "keep_checkpoints": 1}
    assert stage.run(tmp_path, recipe=stage.but(**free)).updates == 6


def test_targets_of_something_else_are_refused(stage: Stage, tmp_path: Path) -> None:
    other = make_stage(tmp_path / "other", seed=1)
    longer = stage.recipe.model_copy(update={"data": stage.recipe.data.model_copy(update={"max_length": 40})})
    for field, recipe, given in (
        ("teacher", None, {"targets": other.targets}),
        ("data", None, {"data": stage.data.model_copy(update={"fingerprint": "other"})}),
        ("temperature", stage.but(loss={"temperature": 1.0}), {}),
        ("max_length", longer, {}),
    ):
        with pytest.raises(TargetError, match=rf"targets of something else \({field}: store has .*, run has"):
            stage.run(tmp_path / "run", recipe=recipe, **given)
    assert not (tmp_path / "run").exists()


# Validation

VALIDATION = {"validation": {"samples": 3, "every_updates": 2}}


class Heard(Kept):
    """Keeps what validation found, by update."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        found = {name.removeprefix("validation/"): v for name, v in values.items() if name.startswith("validation/")}
        if found:
            self.seen[step] = found


def test_validation_by_hand(stage: Stage, tmp_path: Path) -> None:
    heard = Heard()
    trained = stage.run(tmp_path, heard, stage.but(**VALIDATION))
    _, rest = split(open_dataset(stage.data), 3)
    batch = batch_of(stage, [list(open_dataset(stage.data)["id"]).index(id) for id in rest["id"]])
    temperature = stage.recipe.distill.loss.temperature
    teacher, _ = locate.load(stage.teacher.uri)
    expected = kept_logits(teacher, batch)
    for update, checkpoint in ((0, stage.student), (trained.updates, trained)):
        student, _ = locate.load(checkpoint.uri)
        with torch.no_grad():
            divergence = dense_kl(expected, kept_logits(student, batch), temperature) / len(expected)
            layer = TeacherForced(SharedTrunk(student, teacher), batch, "l2").value() / batch.real.sum()
        assert heard.seen[update]["loss_prob"] == pytest.approx(float(divergence), rel=1e-3)  # the store has float16
        assert heard.seen[update]["loss_layer"] == pytest.approx(float(layer), rel=1e-5)
    assert list(heard.seen) == [0, 2, 4]  # eight samples are left, two batches an epoch


def test_what_is_validated_on_is_not_trained_on(stage: Stage, tmp_path: Path) -> None:
    dataset = open_dataset(stage.data)
    trained, held_out = split(dataset, 3)
    assert sorted([*trained["id"], *held_out["id"]]) == sorted(dataset["id"])
    assert (
        num_updates(stage.but(**VALIDATION).distill, len(trained))
        == stage.run(tmp_path, recipe=stage.but(**VALIDATION)).updates
    )
    with pytest.raises(ValueError, match=r"distill.validation.samples is 11 and there are only 11 samples"):
        stage.run(tmp_path / "none", recipe=stage.but(validation={"samples": NUM_SAMPLES}))


def test_conversations_are_held_out_whole() -> None:
    ids = [f"sample-{number}{part}" for number in range(20) for part in ([""] if number % 3 else [".0", ".1", ".2"])]
    trained, held_out = split(datasets.Dataset.from_dict({"id": ids}), 10)
    images = [{id.partition(".")[0] for id in part["id"]} for part in (trained, held_out)]
    assert not images[0] & images[1]
    assert len(images[0] | images[1]) == 20
    assert 10 <= len(held_out) <= 12
    assert len(trained) + len(held_out) == len(ids)


def test_what_cannot_be_validated_on_is_counted(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage")
    recipe = stage.but(**VALIDATION)
    _, rest = split(open_dataset(stage.data), 3)
    names = [f"{id.rpartition('-')[2]}.png" for id in rest["id"]]
    (tmp_path / "stage" / names[0]).unlink()
    with pytest.raises(DistillError, match=f"1 samples cannot be loaded any more.*{names[0]}"):
        stage.run(tmp_path / "strict", recipe=recipe)
    for name in names[1:]:
        (tmp_path / "stage" / name).unlink()
    lenient = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_bad_share": 1.0})})
    with pytest.raises(DistillError, match="no sample to validate on can be loaded"):
        stage.run(tmp_path / "lenient", recipe=lenient)


def test_graphs_are_validated_without(stage: Stage, tmp_path: Path) -> None:
    plain, graphs = Heard(), Heard()
    stage.run(tmp_path / "plain", plain, stage.but(**VALIDATION))
    stage.run(tmp_path / "graphs", graphs, stage.but(**VALIDATION, cuda_graphs=True))
    assert list(graphs.seen) == list(plain.seen)
    for update, found in plain.seen.items():
        assert graphs.seen[update] == pytest.approx(found, rel=1e-4)


def test_validation_changes_nothing_but_the_samples(stage: Stage, tmp_path: Path) -> None:
    often, never = (stage.but(validation={"samples": 3, "every_updates": every}) for every in (1, 1000))
    assert weights(stage.run(tmp_path / "often", recipe=often)) == weights(stage.run(tmp_path / "never", recipe=never))


def test_a_continued_run_has_the_whole_curve_of_validation(stage: Stage, tmp_path: Path) -> None:
    recipe = stage.but(**VALIDATION)
    whole, heard = Heard(), Heard()
    stage.run(tmp_path / "whole", whole, recipe)
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path / "broken", Kept(at=3, then=stop), recipe)
    stage.run(tmp_path / "broken", heard, recipe)
    assert heard.seen == whole.seen
