"""Packed rows: how samples are put together, and that a model does with them what it does with each alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, Family
from tiny_teacher import Teacher
from torch import Tensor
from transformers import AttentionInterface, PhiConfig, PhiForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from matvlm.config import Positions
from matvlm.data.encoding import IGNORE, Batch, Encoder, Sample, Turn
from matvlm.data.packing import collate, pack
from matvlm.init import convert_
from matvlm.losses import cross_entropy_sum, dense_kl, layer_l2
from matvlm.models import packing
from matvlm.models.hybrid import decoder_layers, find_connector, mixers, trained_parameters
from matvlm.models.mixer import Mamba2Mixer
from matvlm.models.watch import watch
from matvlm.teacher import kept_logits

REFUSED = {"qwen2_vl", "qwen2_5_vl", "paligemma", "gemma3"}
LOGITS, LOSSES, GRADIENTS = 1e-4, 1e-5, 1e-4
"""Largest differences between packed and padded samples, of logits, and of each loss and gradient relative to the
largest value. Measured over all families: 9.1e-6 (of up to 10), 3e-7 and 2.8e-5."""
ENCODER = Encoder(SimpleNamespace(pad_token_id=0))


def sized(*lengths: int) -> list[Sample]:
    return [Sample(str(number), torch.arange(n), torch.arange(n), {}) for number, n in enumerate(lengths)]


def names(rows: list[list[Sample]]) -> list[list[str]]:
    return [[sample.id for sample in row] for row in rows]


def test_the_longest_go_first_into_the_first_row_with_room() -> None:
    assert names(pack(sized(3, 6, 4, 2, 6, 1), 9)) == [["1", "0"], ["4", "3", "5"], ["2"]]
    assert names(pack(sized(5, 5), 9)) == [["0"], ["1"]]
    assert names(pack(sized(4, 5), 9)) == [["1", "0"]]
    assert pack([], 9) == []


def test_every_sample_is_in_one_row_that_has_room_for_it() -> None:
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(sized(*lengths), 50)
    assert sorted(sample.id for row in rows for sample in row) == sorted(map(str, range(200)))
    assert max(sum(len(sample.input_ids) for sample in row) for row in rows) <= 50
    assert len(rows) <= 1.05 * sum(lengths) / 50  # measured: the least possible


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 1: its 10 tokens do not fit into a row of 9"):
        pack(sized(3, 10), 9)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


def encoded(teacher: Teacher, positions: Positions) -> tuple[Encoder, list[list[Sample]]]:
    """Two rows of two samples and of one, with one image each."""
    encoder = Encoder(teacher.processor, 64, positions)
    turns = [Turn("what color", "red"), Turn("is there a circle", "yes there is a circle"), Turn("what color", "blue")]
    colors = ("red", "green", "blue")
    a, b, c = (
        encoder.encode(color, Image.new("RGB", (16, 16), color), turns[: number + 1])
        for number, color in enumerate(colors)
    )
    return encoder, [[b, a], [c]]


@pytest.mark.parametrize("positions", ["answer", "text", "all"])
def test_a_packed_batch_keeps_what_each_sample_alone_keeps(teacher: Teacher, positions: Positions) -> None:
    encoder, rows = encoded(teacher, positions)
    rows[0][1].labels[0] = rows[0][1].input_ids[0]  # as in plain text, where nothing stands before it either
    batch = collate(rows, encoder)
    alone = [encoder.collate([sample]) for row in rows for sample in row]
    assert batch.ids == ["green", "red", "blue"]
    assert torch.equal(batch.kept_labels, torch.cat([one.kept_labels for one in alone]))
    ids = batch.inputs["input_ids"]
    assert torch.equal(ids[batch.kept], torch.cat([one.inputs["input_ids"][one.kept] for one in alone]))
    assert torch.equal(ids[batch.real], torch.cat([one.inputs["input_ids"][0] for one in alone]))
    assert not (batch.kept & ~batch.real).any()
    assert (batch.labels[~batch.real] == IGNORE).all()
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([one.inputs["pixel_values"] for one in alone]))
    assert torch.equal(batch.unmasked().real, batch.real)
    assert batch.to("meta").kept.device.type == batch.to("meta").inputs["seq_idx"].device.type == "meta"


def test_positions_start_again_with_every_sample_and_with_padding() -> None:
    a, b, c = sized(3, 2, 4)
    inputs = collate([[b, a], [c]], ENCODER).inputs
    assert inputs["input_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert inputs["seq_idx"].tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert inputs["seq_idx"].dtype == torch.int32
    assert "attention_mask" not in inputs


def samples_of(family: Family, model: PreTrainedModel) -> list[Sample]:
    """Seven samples of 4 to 12 text tokens, with an image each where the family has them."""
    found = []
    for number, length in enumerate((4, 12, 7, 5, 9, 6, 8)):
        inputs = family.sample(model, length, seed=number)
        ids = inputs.pop("input_ids")[0]
        del inputs["attention_mask"]
        labels = ids.clone()
        labels[: -length // 2] = IGNORE
        found.append(Sample(f"{number}", ids, labels, inputs))
    return found


def both_ways(samples: list[Sample]) -> tuple[Batch, Batch]:
    """``samples`` packed into at least two rows of different lengths, and padded, in one order."""
    rows = pack(samples, 2 * max(len(sample.input_ids) for sample in samples) + 5)
    packed = collate(rows, ENCODER)
    assert 1 < len(rows) < len(samples)
    assert not packed.real.all()
    return packed, ENCODER.collate([sample for row in rows for sample in row])


def learned(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """The losses of ``batch``, the gradients of all that is trained for their sum, by name; and the logits."""
    trained = trained_parameters(student, find_connector(student) is not None)
    logits = kept_logits(student, batch)
    with torch.no_grad():
        expected = kept_logits(teacher, batch)
    found = {"ce": cross_entropy_sum(logits, batch.kept_labels), "kl": dense_kl(expected, logits)}
    replaced = {index: decoder_layers(teacher)[index].self_attn for index in mixers(student)}
    for index, seen in watch(teacher, replaced, batch.inputs).items():
        output, _ = mixers(student)[index](hidden_states=seen.hidden, **seen.kwargs)
        found[f"layer {index}"] = layer_l2(output, seen.output, batch.real)
    gradients = torch.autograd.grad(torch.stack(list(found.values())).sum(), list(trained.values()))
    return found | dict(zip(trained, gradients, strict=True)), logits.detach()


CASES = [(name, FAMILIES[name].init) for name in FAMILIES if name not in REFUSED]
CASES += [(name, "paper") for name in ("llava", "llama", "gemma2")]


@pytest.mark.parametrize(("name", "init"), CASES)
def test_packing_equals_padding(name: str, init: str) -> None:
    family = FAMILIES[name]
    teacher, student = family.build(), family.build()
    convert_(student, family.layers, init, seed=1, chunk_size=16)
    for model in (teacher, student):
        packing.check(model)
    packed, padded = both_ways(samples_of(family, teacher))
    actual, logits = learned(student, teacher, packed)
    expected, expected_logits = learned(student, teacher, padded)
    assert actual.keys() == expected.keys()
    assert torch.equal(packed.kept_labels, padded.kept_labels)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=LOGITS)
    for key, wanted in expected.items():
        difference = (actual[key] - wanted).abs().max() / wanted.abs().max()
        assert difference < (GRADIENTS if wanted.dim() else LOSSES), key


@pytest.mark.parametrize("init", ["aligned", "paper"])
@torch.no_grad()
def test_another_image_and_text_change_nothing_elsewhere(init: str) -> None:
    """The paper's LLaVA. Measured: the other samples' logits move by at most 1e-6, the changed one's by 2.9 or more."""
    family = FAMILIES["llava"]
    model = family.build()
    convert_(model, family.layers, init, seed=1, chunk_size=16)
    samples = samples_of(family, model)
    before, _ = both_ways(samples)
    logits = kept_logits(model, before)
    owner = torch.cat([torch.full((int(ENCODER.collate([s]).kept.sum()),), n) for n, s in enumerate(ordered(samples))])
    for changed, sample in enumerate(ordered(samples)):
        images = {name: -value for name, value in sample.image_inputs.items()}
        ids = torch.where(sample.input_ids < 60, 59 - sample.input_ids, sample.input_ids)
        other = Sample(sample.id, ids, sample.labels, images)
        after, _ = both_ways([other if one is sample else one for one in samples])
        difference = (kept_logits(model, after) - logits).abs().amax(-1)
        assert difference[owner != changed].max() < 1e-5
        assert difference[owner == changed].max() > 1


def ordered(samples: list[Sample]) -> list[Sample]:
    """``samples`` as they stand in the rows of ``both_ways``."""
    packed, _ = both_ways(samples)
    return [samples[int(name)] for name in packed.ids]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("qwen2_vl", r"qwen2_vl: positions in an image have height and width \(mrope\)"),
        ("qwen2_5_vl", r"qwen2_5_vl: positions in an image have height and width \(mrope\)"),
        ("paligemma", "paligemma: the image and the prompt attend to each other in both directions"),
        ("gemma3", "gemma3: an image's tokens attend to each other in both directions"),
    ],
)
def test_families_whose_images_need_more_are_refused(name: str, complaint: str) -> None:
    assert name in REFUSED
    with pytest.raises(ValueError, match=complaint):
        packing.check(FAMILIES[name].build())


def test_mixers_that_are_told_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llava"].build()
    convert_(model, [2], "aligned")
    packing.check(model)
    forward = Mamba2Mixer.forward
    monkeypatch.setattr(
        Mamba2Mixer, "forward", lambda self, *args, seq_idx=None, **kwargs: forward(self, *args, **kwargs)
    )
    with pytest.raises(ValueError, match=r"llava with sdpa attention: .* \d+% reach the next sample of a packed row"):
        packing.check(model)


def test_attentions_that_are_told_nothing_are_noticed() -> None:
    """An attention with no mask of its own, as flash attention is for several rows."""
    AttentionInterface.register("without_mask", sdpa_attention_forward)
    model = FAMILIES["phi"].build()
    model.set_attn_implementation("without_mask")
    with pytest.raises(ValueError, match=r"phi with without_mask attention: .* choose another attention"):
        packing.check(model)


def test_the_check_leaves_training_mode_as_it_is_and_dropout_out() -> None:
    model = PhiForCausalLM(PhiConfig(**{**FAMILIES["phi"].config, "resid_pdrop": 0.5})).train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    packing.check(model)
    assert [module.training for module in model.modules()] == before
    assert not all(before)
