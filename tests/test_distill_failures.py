"""Updates that fail: broken ones are skipped without a trace, counted and limited; too little memory is explained."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_distill import NUM_SAMPLES, Kept, Stage, is_mixers, make_stage

from matvlm.artifacts import Checkpoint
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import open_dataset
from matvlm.distill import DistillError
from matvlm.distill.schedule import order
from matvlm.distill.step import Steps


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


def weights(checkpoint: Checkpoint) -> bytes:
    return (Path(checkpoint.uri) / "model.safetensors").read_bytes()


def stop() -> None:
    raise KeyboardInterrupt


class Counting(Kept):
    """Keeps the count of skipped updates as well."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.skipped = [*getattr(self, "skipped", []), values["skipped_updates"]]
        super().metrics(values, step)


def ids_of(stage: Stage, update: int, count: int = 2) -> list[str]:
    """Of the first micro-batch, or the first ``count``."""
    dataset = open_dataset(stage.data)
    return [dataset[row]["id"] for row in order(NUM_SAMPLES, 4, stage.recipe.seed, update)[:count]]


def break_pixels(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """Every batch with the sample ``bad`` gets pixels that are no numbers."""
    collate = Encoder.collate

    def broken(self: Encoder, samples: Any) -> Batch:
        batch = collate(self, samples)
        if bad in batch.ids:
            batch.inputs["pixel_values"].fill_(math.nan)
        return batch

    monkeypatch.setattr(Encoder, "collate", broken)


def break_loss(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """The loss of every batch with the sample ``bad`` is infinite, its gradient is not."""
    passes = Steps.passes

    def broken(self: Steps, *given: Any, **more: Any) -> Any:
        for made in passes(self, *given, **more):
            yield made._replace(loss=made.loss + (math.inf if bad in made.ids else 0.0))

    monkeypatch.setattr(Steps, "passes", broken)


@pytest.mark.parametrize("break_it", [break_pixels, break_loss])
def test_a_skipped_update_trains_nothing(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[pytest.MonkeyPatch, str], None],
) -> None:
    constant = {"warmup_updates": 0, "decay_updates": 0}
    one = stage.run(tmp_path / "one", recipe=stage.but(max_updates=1, schedule=constant))
    ids = ids_of(stage, 2)
    break_it(monkeypatch, ids[0])
    kept = Counting()
    two = stage.run(tmp_path / "two", kept, recipe=stage.but(max_updates=2, schedule=constant))
    assert weights(two) == weights(one)
    assert (kept.skipped, kept.seen[2]) == ([0, 1], {"lr": 1e-2})
    together = ", ".join(ids_of(stage, 2, 4))  # for the teacher both micro-batches are one
    warning = f"update 2 is skipped (1 so far): the loss is not finite on samples {together}"
    assert [record.getMessage() for record in caplog.records if record.name == "matvlm.distill.failures"] == [warning]


def test_a_continued_run_has_skipped_the_same(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample, so one update in each of the two epochs: one before the snapshot and one after it."""
    intact, uninterrupted, kept = Counting(), Counting(), Counting()
    other = stage.run(tmp_path / "intact", intact)
    bad = ids_of(stage, 3)[0]
    assert bad in ids_of(stage, 5)
    break_pixels(monkeypatch, bad)
    expected = stage.run(tmp_path / "whole", uninterrupted)
    assert uninterrupted.skipped == [0, 0, 1, 1, 2, 2]
    assert [values["lr"] for values in uninterrupted.seen.values()] == [values["lr"] for values in intact.seen.values()]
    with pytest.raises(KeyboardInterrupt):
        stage.run(tmp_path / "run", Kept(at=5, then=stop))
    continued = stage.run(tmp_path / "run", kept)
    assert kept.computed == [5, 6]
    assert (kept.skipped, kept.seen) == (uninterrupted.skipped, uninterrupted.seen)
    assert weights(continued) == weights(expected) != weights(other)


def test_a_continued_run_is_stopped_by_what_it_skipped_before(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it may be continued with a higher limit."""
    bad = ids_of(stage, 3)[0]
    break_pixels(monkeypatch, bad)
    strict = stage.but(max_skipped_updates=1)
    for start in (1, 5):
        kept = Kept()
        with pytest.raises(
            DistillError, match=rf"2 of 6 updates .*: update 3 on {bad}, .*; update 5 on .*{bad}.*; in the last"
        ):
            stage.run(tmp_path, kept, recipe=strict)
        assert min(kept.computed, default=5) == start
    assert stage.run(tmp_path, recipe=stage.but(max_skipped_updates=2)).updates == 6


def broken_student(stage: Stage, folder: Path) -> Checkpoint:
    shutil.copytree(stage.student.uri, folder)
    tensors = load_file(folder / "model.safetensors")
    next(value for name, value in tensors.items() if name.endswith("out_proj.weight") and is_mixers(name))[0, 0] = (
        math.nan
    )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return stage.student.model_copy(update={"uri": str(folder)})


def test_too_many_skipped_updates_stop_the_run(stage: Stage, tmp_path: Path) -> None:
    student = broken_student(stage, tmp_path / "broken")
    first, second, third = (", ".join(ids_of(stage, update, count=4)) for update in (1, 2, 3))
    strict = stage.but(max_skipped_updates=0)
    with pytest.raises(DistillError, match=rf"1 of 6 updates .*: update 1 on {first}; .* loss is not finite\. Lower"):
        stage.run(tmp_path / "run", recipe=strict, student=student)
    with pytest.raises(DistillError, match=rf"update 1 on {first}; .* gradient norm is inf\. Lower"):
        stage.run(tmp_path / "run", recipe=stage.but(max_skipped_updates=0, loss={"layer": 1e37}))
    assert not (tmp_path / "run").exists(), "nothing of it is kept"
    named = rf"max_skipped_updates allows 2.*update 1 on {first}; update 2 on {second}; update 3 on {third}; in the"
    with pytest.raises(DistillError, match=rf"3 of 6 updates .*{named}"):
        stage.run(tmp_path / "run", recipe=stage.but(max_skipped_updates=2), student=student)
    with pytest.raises(DistillError, match="1 of 1 updates had to be skipped"):
        stage.run(tmp_path / "one", recipe=stage.but(max_updates=1), student=student)


GPU_MESSAGE = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def test_out_of_memory_says_what_to_lower(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_gpu() -> None:
        raise torch.OutOfMemoryError(GPU_MESSAGE)

    def on_cpu() -> None:
        torch.empty(2**50)

    lower = r"lower distill\.micro_batch_size \(2; .*\) or data\.max_length \(64\), keep less .*\), or share .*zero"
    for asked, failing in (("4503599627370496 bytes", on_cpu), ("20.00 GiB", on_gpu)):
        monkeypatch.setattr("matvlm.distill.step.kept_hidden", lambda *_, failing=failing: failing())
        message = rf"update 1: out of memory on cpu: {asked} asked for, [1-9\d]*\.\d GB in use at most; {lower}"
        with pytest.raises(DistillError, match=message) as caught:
            stage.run(tmp_path / "run")
        assert isinstance(caught.value.__cause__, RuntimeError)
    monkeypatch.setattr("matvlm.distill.step.kept_hidden", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        stage.run(tmp_path / "run")
