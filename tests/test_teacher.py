"""The teacher's logits, the fingerprint of its weights, and the identity of its targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_families import batch as together
from tiny_teacher import Teacher
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from matvlm.artifacts import DataManifest
from matvlm.data.encoding import IGNORE, Batch
from matvlm.recipes import parse_recipe
from matvlm.targets import Identity
from matvlm.teacher import fingerprint, forward_as, head, kept_hidden, kept_logits


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher()


def test_kept_logits_are_the_models_logits_at_answers_and_nothing_more(teacher: Teacher) -> None:
    batch = teacher.batch(teacher.rows[:3])
    head_rows = []
    hook = teacher.model.lm_head.register_forward_hook(lambda _m, inputs, _o: head_rows.append(inputs[0].shape[:-1]))
    kept = kept_logits(teacher.model, batch)
    hook.remove()
    full = teacher.model(**batch.inputs).logits
    assert head_rows == [(1, len(kept))]
    # Measured: no difference at logits up to 39, but another matrix shape may round differently.
    torch.testing.assert_close(kept, full[batch.kept], rtol=0, atol=1e-4)
    next_tokens = batch.labels[batch.labels != IGNORE]
    assert len(kept) == len(next_tokens)
    assert kept.requires_grad
    assert teacher.model(**batch.inputs).logits.shape == full.shape, "nothing of it stays"


def test_kept_logits_keep_a_familys_soft_capping() -> None:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.1,
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    batch = Batch(["a", "b"], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone())
    with torch.no_grad():
        kept = kept_logits(model, batch)
        assert 0.05 < kept.abs().max() < 0.1
        torch.testing.assert_close(kept, model(**batch.inputs).logits[batch.kept], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["granite", "qwen2_vl", "llava_onevision", "paligemma", "smolvlm", "mistral3"])
def test_the_head_of_every_kind_of_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = together([family.sample(model, 12, seed=0), family.sample(model, 9, seed=1)])
    batch = Batch(["a", "b"], inputs, inputs["input_ids"])
    # Measured: no difference at logits up to 7, in any of the 24 families.
    torch.testing.assert_close(
        kept_logits(model, batch), model(**inputs, use_cache=False).logits[batch.kept], rtol=0, atol=1e-5
    )


def test_the_head_in_parts_and_its_gradient(teacher: Teacher) -> None:
    hidden = kept_hidden(teacher.model, teacher.batch(teacher.rows[:3])).detach().requires_grad_()
    whole = head(teacher.model, hidden)
    parts = torch.cat([head(teacher.model, part) for part in hidden.split(2)])
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-4)  # logits up to 39; measured: no difference
    (gradient,) = torch.autograd.grad(whole.sum(), hidden)
    expected = teacher.model.lm_head.weight.sum(0).expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)


def test_another_forward_for_a_while() -> None:
    module: Any = nn.Linear(2, 2)
    own = module.forward
    with forward_as(module, lambda x: x + 1):
        with pytest.raises(ZeroDivisionError), forward_as(module, lambda x: x / 0):
            module(1)
        assert module(1) == 2
    assert module.forward == own
    assert "forward" not in vars(module)


def test_fingerprint_follows_the_weights_and_not_the_file(teacher: Teacher, tmp_path: Path) -> None:
    before = fingerprint(teacher.model)
    teacher.model.save_pretrained(tmp_path)
    copy = type(teacher.model).from_pretrained(tmp_path)
    assert fingerprint(copy) == before
    with torch.no_grad():
        copy.lm_head.weight[3, 5] += 1e-3
    assert fingerprint(copy) != before
    assert fingerprint(copy.bfloat16()) != before


def test_identity_covers_template_and_image_settings(teacher: Teacher, tmp_path: Path) -> None:
    recipe = parse_recipe("{name: r, data: {max_turns: 3}, targets: {top_k: 9}, distill: {loss: {temperature: 1.5}}}")
    data = DataManifest(uri="u", num_samples=1, num_skipped=0, skipped={}, fingerprint="f")
    teacher.processor.save_pretrained(tmp_path)
    load = type(teacher.processor).from_pretrained
    original = Identity.of(recipe, data, teacher.processor, "w")
    assert (original.max_turns, original.top_k, original.temperature, original.data) == (3, 9, 1.5, "f")
    assert Identity.of(recipe, data, load(tmp_path), "w") == original
    changes: list[Callable[[Any], Any]] = [
        lambda p: setattr(p, "chat_template", p.chat_template.replace("USER", "HUMAN")),
        lambda p: setattr(p.image_processor, "image_mean", [0.4, 0.5, 0.5]),
        lambda p: setattr(p, "patch_size", 4),
        lambda p: p.tokenizer.add_tokens(["pentagon"]),
    ]
    for change in changes:
        processor = load(tmp_path)
        change(processor)
        other = Identity.of(recipe, data, processor, "w")
        assert other.differences(original).startswith("template: store has")
        assert other.sha256 != original.sha256
