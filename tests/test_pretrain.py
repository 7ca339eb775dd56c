"""Pretraining: figures stay whole, batches are functions of (seed, update), a resumed run equals a whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_teacher import TINY
from torch import Tensor
from torch.utils.data import DataLoader

from matvlm.artifacts import DataManifest
from matvlm.config import Data
from matvlm.data.corpus import Conversations, Corpus, TokenTurn, augment
from matvlm.data.encoding import IGNORE, Encoder
from matvlm.data.prepare import open_dataset, prepare, turns_of
from matvlm.models import hybrid, small
from matvlm.pretrain import PretrainRecipe, Training, _build, _set_lr, pretrain
from matvlm.reporting import Reporter
from matvlm.snapshots import SnapshotError

COLORS = [(250, 40, 40), (40, 200, 60), (60, 60, 240)]
BACKGROUNDS = [(0, 0, 0), (240, 230, 250), (120, 130, 110)]
RECIPE = PretrainRecipe(
    name="tiny",
    model=TINY,
    training=Training(
        updates=6,
        batch_size=4,
        max_turns=2,
        warmup_updates=2,
        held_out_images=2,
        evaluate_every_updates=2,
        checkpoint_every_updates=2,
    ),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataManifest:
    """Nine pictures of 16 x 16 pixels: boxes and dots of three colours on three backgrounds, three questions each."""
    folder = tmp_path_factory.mktemp("figures")
    samples = []
    for number in range(9):
        image = Image.new("RGB", (16, 16), BACKGROUNDS[number // 3])
        left, top = 1 + number % 4, (number * 5) % 9
        draw = ImageDraw.Draw(image).rectangle if number % 2 else ImageDraw.Draw(image).ellipse
        draw((left, top, left + 5, top + 4), fill=COLORS[number % 3])
        image.save(folder / f"{number}.png")
        turns = [
            ("what shape", "box" if number % 2 else "dot"),
            ("what color", f"color{number % 3}"),
            ("red", "yes no"),
        ]
        talk = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        samples.append({"image": f"{number}.png", "conversations": talk})
    (folder / "talk.json").write_text(json.dumps(samples))
    return prepare(Data(source="llava", path=str(folder / "talk.json")), 0, folder / "out")


@pytest.fixture(scope="module")
def corpus(data: DataManifest) -> Corpus:
    return Corpus(open_dataset(data), encoder(data), 16, "cpu")


def encoder(data: DataManifest) -> Encoder:
    texts = [text for row in open_dataset(data) for turn in turns_of(row) for text in turn]
    return Encoder(small.build_processor(TINY, small.build_tokenizer(texts)))


def content(images: Tensor, background: Tensor) -> Tensor:
    """bool [B, H, W]: where ``images`` in [-1, 1] differ from ``background`` uint8 [B, 3]."""
    return (images - (background / 127.5 - 1)[:, :, None, None]).abs().amax(1) > 0.01


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, left, height, width of what is set in ``mask`` [H, W]."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    top, left = int(rows.min()), int(columns.min())
    return top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1


def test_augmentation_moves_whole_figures_and_fills_with_the_background(corpus: Corpus) -> None:
    chosen = torch.arange(9).repeat(60)
    moved = augment(corpus, chosen, torch.Generator().manual_seed(0))
    before, after = (content(x, corpus.background[chosen]) for x in (corpus.scaled(chosen), moved))
    assert torch.equal(corpus.background, torch.tensor(BACKGROUNDS, dtype=torch.uint8).repeat_interleave(3, 0))
    places = set()
    for image, old, new, pixels in zip(chosen.tolist(), before, after, moved, strict=True):
        assert box(new)[2:] == box(old)[2:] == (5, 6)
        assert new.sum() == old.sum()
        colors = {tuple(((c + 1) * 127.5).round().int().tolist()) for c in pixels.flatten(1).T}
        assert colors == {BACKGROUNDS[image // 3], COLORS[image % 3]}
        places.add(box(new)[:2])
    assert {top for top, _ in places} == set(range(12)), "every place in the frame comes up"
    assert {left for _, left in places} == set(range(11))


def test_augmentation_mirrors_half_of_the_images() -> None:
    """An image that fills its frame cannot be shifted, so mirroring is all that happens to it."""
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    full = Corpus.__new__(Corpus)
    full.images = torch.from_numpy(np.array(gradient)).permute(2, 0, 1)[None]
    full.background, full.room = torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 4, dtype=torch.int64)
    moved = augment(full, torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(0))
    still, mirrored = full.scaled(slice(0, 1)), full.scaled(slice(0, 1)).flip(3)
    kinds = [(torch.equal(image, still[0]), torch.equal(image, mirrored[0])) for image in moved]
    assert all(one != other for one, other in kinds)
    assert 160 < sum(other for _, other in kinds) < 240


def test_augmentation_is_a_function_of_the_generator(corpus: Corpus) -> None:
    chosen = torch.tensor([3, 1, 3])
    first, same, other = (augment(corpus, chosen, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_largest_draw_stays_inside(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest fp32 draw, times the number of places, must not round up to one place too many."""
    largest = float(np.nextafter(np.float32(1), np.float32(0)))
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, largest))
    moved = augment(corpus, torch.arange(9), torch.Generator())
    assert [box(mask)[2:] for mask in content(moved, corpus.background)] == [(5, 6)] * 9
    assert [box(mask)[:2] for mask in content(moved, corpus.background)] == [(11, 10)] * 9


def test_images_are_what_the_processor_makes_of_them(data: DataManifest, corpus: Corpus) -> None:
    row = open_dataset(data)[4]
    sample = encoder(data).encode("x", row["image"], turns_of(row))
    # Measured: 6e-8 apart at most.
    torch.testing.assert_close(corpus.scaled(slice(4, 5)), sample.image_inputs["pixel_values"], atol=1e-6, rtol=0)


def test_conversations_are_the_encoders(data: DataManifest, corpus: Corpus) -> None:
    """Turns tokenised apart and put together equal a conversation encoded as one."""
    row = open_dataset(data)[2]
    whole = encoder(data).encode("x", row["image"], turns_of(row))
    ids = [id for i, turn in enumerate(corpus.turns[2]) for id in (turn.later if i else turn.first) + turn.answer]
    assert ids == whole.input_ids.tolist()
    marked = [id for turn in corpus.turns[2] for id in turn.answer]
    assert marked == whole.labels[whole.labels != IGNORE].tolist()


def conversations(seed: int = 3) -> Conversations:
    turns = [[TokenTurn([1, 2], [3], [100 * image + n]) for n in range(4)] for image in range(20)]
    return Conversations(turns, np.arange(5, 20), batch_size=6, max_turns=3, seed=seed, pad=0)


def test_batches_are_functions_of_seed_and_update() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = [conversations()[update] for update in range(20)]
    again = conversations()
    torch.manual_seed(2)
    np.random.seed(2)
    for update in reversed(range(20)):
        assert all(torch.equal(a, b) for a, b in zip(first[update], again[update], strict=True))
    loader = DataLoader(again, None, sampler=range(15, 20), num_workers=1, multiprocessing_context="fork")
    for expected, found in zip(first[15:], loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not torch.equal(conversations(4)[0][0], first[0][0])
    assert not torch.equal(first[1][0], first[0][0])


def test_batches_hold_distinct_questions_about_distinct_training_images() -> None:
    lengths = set()
    for update in range(30):
        images, ids, labels = conversations()[update]
        assert len(set(images.tolist())) == 6
        assert set(images.tolist()) <= set(range(5, 20)), "a held-out image"
        for image, row, marks in zip(images.tolist(), ids, labels, strict=True):
            answers = marks[marks != IGNORE].tolist()
            assert len(set(answers)) == len(answers)
            assert all(answer // 100 == image for answer in answers)
            assert torch.equal(row[marks != IGNORE], marks[marks != IGNORE])
            assert row[:2].tolist() == [1, 2]
        lengths.add(len(answers))
    assert lengths == {1, 2, 3}
    repeated = Conversations([[TokenTurn([1], [2], [3])]], np.arange(1), batch_size=4, max_turns=2, seed=0, pad=0)
    assert repeated[0][0].tolist() == [0] * 4


def test_learning_rate_rises_then_falls_to_a_hundredth() -> None:
    tower, text = ({"params": [torch.nn.Parameter(torch.ones(1))], "share": share} for share in (1.0, 0.25))
    optimizer = torch.optim.AdamW([tower, text])
    settings = Training(updates=100, warmup_updates=10, lr=1.0)
    rates = [_set_lr(optimizer, settings, update) for update in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[54] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [rates[-1], 0.25 * rates[-1]]


class Killer(Reporter):
    """Keeps the metrics and stops the run when it first reports something at ``update``."""

    def __init__(self, update: int = 0):
        self.update, self.seen = update, dict[int, Any]()

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.seen.setdefault(step, {}).update(values)
        if step == self.update:
            raise KeyboardInterrupt


def is_text(name: str) -> bool:
    return "language_model" in name or name.startswith("lm_head")


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_resumed_run_equals_an_uninterrupted_one(
    share: float, data: DataManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.model_copy(update={"training": RECIPE.training.model_copy(update={"text_lr_share": share})})
    monkeypatch.setattr("matvlm.pretrain.LOG_EVERY_UPDATES", 1)
    whole, killed, resumed = Killer(), Killer(update=5), Killer()
    torch.manual_seed(1)
    checkpoint = pretrain(recipe, data, tmp_path / "whole", whole, "cpu")
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, data, tmp_path / "parts", killed, "cpu")
    assert sorted(os.listdir(tmp_path / "parts" / "snapshots")) == ["update-000002", "update-000004"]
    torch.manual_seed(2)
    np.random.seed(2)
    continued = pretrain(recipe, data, tmp_path / "parts", resumed, "cpu")
    assert list(resumed.seen) == [5, 6], "it goes on from the snapshot"
    assert resumed.seen[6] == whole.seen[6]
    assert resumed.seen[5] == whole.seen[5]
    assert {"loss", "grad_norm", "lr", "held_out_accuracy"} == set(whole.seen[6])
    files = [Path(one.uri) / "model.safetensors" for one in (checkpoint, continued)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert continued.model_copy(update={"uri": checkpoint.uri}) == checkpoint
    model, _ = hybrid.load(Path(checkpoint.uri))
    assert checkpoint.parameters == sum(p.numel() for p in model.parameters())
    assert len({whole.seen[update]["loss"] for update in range(1, 7)}) == 6
    start, _ = _build(recipe, open_dataset(data))
    after, before = model.state_dict(), start.state_dict()
    text = [name for name in after if is_text(name)]
    assert [name for name in text if torch.equal(after[name].half(), before[name].half())] == ([] if share else text)
    trained = [parameter for name, parameter in model.named_parameters() if share or not is_text(name)]
    assert checkpoint.trained_parameters == sum(parameter.numel() for parameter in trained)


def test_a_snapshot_of_other_data_or_settings_is_refused(data: DataManifest, tmp_path: Path) -> None:
    pretrain(RECIPE, data, tmp_path, Reporter(), "cpu")
    with pytest.raises(SnapshotError, match=r"data is .* in the snapshot and 'other' in this run"):
        pretrain(RECIPE, data.model_copy(update={"fingerprint": "other"}), tmp_path, Reporter(), "cpu")
    hotter = RECIPE.training.model_copy(update={"lr": 0.5})
    with pytest.raises(SnapshotError, match=r"training\.lr is 0\.001 in the snapshot and 0\.5 in this run"):
        pretrain(RECIPE.model_copy(update={"training": hotter}), data, tmp_path, Reporter(), "cpu")


def test_unfitting_data_is_refused(data: DataManifest, tmp_path: Path) -> None:
    many = RECIPE.training.model_copy(update={"held_out_images": 9})
    with pytest.raises(ValueError, match=r"training\.held_out_images is 9 and there are only 9 images"):
        pretrain(RECIPE.model_copy(update={"training": many}), data, tmp_path, Reporter(), "cpu")
    large = RECIPE.model.model_copy(update={"image_size": 32})
    with pytest.raises(ValueError, match=r"image of sample-0: \(16, 16\) pixels, and model\.image_size is 32"):
        pretrain(RECIPE.model_copy(update={"model": large}), data, tmp_path, Reporter(), "cpu")
