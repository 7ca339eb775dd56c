"""Alignment: what the mixers are fed and compared with, that they learn it, and each for itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.alignment import align
from matvlm.config import Optimizer
from matvlm.init import INITS, convert_
from matvlm.models.hybrid import decoder_layers
from matvlm.models.mixer import Mamba2Mixer
from matvlm.models.watch import watch

OPTIMIZER = Optimizer(lr=3e-3, clip_grad_norm=1.0)
SAME = 1e-5
"""Relative: the same sums in another order of summation differ by 3.1e-7 at most here."""


def mixer(model: PreTrainedModel, layer: int, init: str = "aligned", seed: int = 0) -> Mamba2Mixer:
    generator = torch.Generator().manual_seed(seed)
    return INITS[init](decoder_layers(model)[layer].self_attn, layer, generator, 8)


def text(seed: int, padding: int = 0) -> dict[str, Tensor]:
    """Three sequences of 12 tokens, the first with ``padding`` at its end."""
    ids = tiny_models.token_ids(3, 12, seed)
    mask = torch.ones_like(ids)
    if padding:
        mask[0, -padding:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def batches(count: int) -> list[dict[str, Tensor]]:
    return [text(seed, padding=seed % 4) for seed in range(count)]


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_first_loss_is_the_distance_to_attention_on_real_tokens(family: str) -> None:
    model = getattr(tiny_models, family)()
    candidate, batch, layer = mixer(model, 1), text(0, padding=5), cast(Any, decoder_layers(model)[1])
    seen = watch(model, {1: layer.self_attn}, batch)[1]
    with torch.no_grad():
        answer, _ = candidate(hidden_states=seen.hidden, **seen.kwargs)
        states = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        normed = layer.input_layernorm(states[1])
    torch.testing.assert_close(seen.hidden, normed)
    real = batch["attention_mask"].bool()
    expected = (answer - seen.output)[real].square().mean()
    spread = (seen.output[real] - seen.output[real].mean(0)).square().mean()
    curve = align(model, {"only": {1: candidate}}, [batch], OPTIMIZER)["only"][1]
    assert curve.loss == pytest.approx([float(expected)], rel=SAME)
    assert curve.relative == pytest.approx([float(expected / spread)], rel=SAME)


def test_padding_changes_nothing() -> None:
    model, batch = tiny_models.phi(), text(0, padding=5)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)}
    first, second = (align(model, {"m": {2: mixer(model, 2)}}, [inputs] * 3, OPTIMIZER) for inputs in (batch, other))
    assert first["m"][2].loss == pytest.approx(second["m"][2].loss, rel=SAME)


def test_a_mask_of_ones_and_none_are_the_same() -> None:
    model, batch = tiny_models.llama(), text(0)
    bare = {"input_ids": batch["input_ids"]}
    first, second = (align(model, {"m": {0: mixer(model, 0)}}, [inputs] * 2, OPTIMIZER) for inputs in (batch, bare))
    assert first["m"][0].loss == pytest.approx(second["m"][0].loss, rel=SAME)


def test_candidates_learn_each_for_itself_and_the_teacher_stays() -> None:
    model = tiny_models.phi()
    before = copy.deepcopy(model.state_dict())
    attentions = [layer.self_attn for layer in decoder_layers(model)]
    alone = {"aligned": {2: mixer(model, 2)}}
    together = {
        "aligned": {1: mixer(model, 1), 2: mixer(model, 2)},
        "paper": {2: mixer(model, 2, "paper"), 3: mixer(model, 3, "paper")},
    }
    expected = align(model, alone, batches(12), OPTIMIZER)["aligned"][2]
    curves = align(model, together, batches(12), OPTIMIZER)
    assert curves["aligned"][2] == expected
    found, wanted = together["aligned"][2].state_dict(), alone["aligned"][2].state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert {name: set(layers) for name, layers in curves.items()} == {"aligned": {1, 2}, "paper": {2, 3}}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [layer.self_attn for layer in decoder_layers(model)] == attentions
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("init", sorted(INITS))
def test_the_error_falls(init: str) -> None:
    """Last over first, measured: aligned 0.0078, paper 0.0136, random 0.0138."""
    model = tiny_models.llama()
    curve = align(model, {"m": {1: mixer(model, 1, init)}}, [text(0)] * 60, Optimizer(lr=1e-2, clip_grad_norm=1.0))
    assert curve["m"][1].relative[-1] < 0.05 * curve["m"][1].relative[0]


def test_images_and_mixers_in_every_layer() -> None:
    model = tiny_models.llava()
    candidates = {"m": {layer: mixer(model, layer) for layer in range(4)}}
    done: list[int] = []
    inputs: list[Mapping[str, Tensor]] = [tiny_models.vlm_inputs(2, 6, seed) for seed in range(3)]
    curves = align(model, candidates, inputs, OPTIMIZER, on_update=done.append)["m"]
    assert done == [1, 2, 3]
    assert [len(curves[layer].loss) for layer in range(4)] == [3] * 4


def test_bfloat16_teacher_with_autocast_trains_float32_mixers() -> None:
    """Losses of a bfloat16 teacher, relative to the float32 one's: 2.0 % off at most, measured."""
    whole, half = tiny_models.phi(), tiny_models.phi().to(torch.bfloat16)
    expected = align(whole, {"m": {1: mixer(whole, 1)}}, batches(3), OPTIMIZER)["m"][1]
    candidate = mixer(half, 1)
    curve = align(half, {"m": {1: candidate}}, batches(3), OPTIMIZER, torch.bfloat16)["m"][1]
    assert {parameter.dtype for parameter in candidate.parameters()} == {torch.float32}
    assert curve.relative == pytest.approx(expected.relative, rel=0.05)


def test_an_attention_that_answers_nothing_breaks_nothing() -> None:
    model = tiny_models.llama()
    attention: Any = decoder_layers(model)[1].self_attn
    torch.nn.init.zeros_(attention.o_proj.weight)
    curve = align(model, {"m": {1: mixer(model, 1, "random")}}, [text(0)] * 5, OPTIMIZER)["m"][1]
    assert 0 < curve.relative[-1] < curve.relative[0]


def test_layers_that_are_no_attention_are_refused() -> None:
    model = tiny_models.phi()
    candidate = mixer(model, 1)
    with pytest.raises(ValueError, match=r"layers \[4\]: the model has layers 0 to 3"):
        align(model, {"m": {4: candidate}}, [text(0)], OPTIMIZER)
    convert_(model, [1], "paper")
    with pytest.raises(ValueError, match=r"layers \[1\] are Mamba-2 already"):
        align(model, {"m": {1: candidate}}, [text(0)], OPTIMIZER)
