"""Losses on logits taken a few positions at a time are those taken at once, with the same gradient."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from matvlm.config import Loss
from matvlm.data.encoding import IGNORE, Batch
from matvlm.distill.objective import Cached, Counts, Divisors, Online, logit_losses
from matvlm.losses import (
    bucket_logprobs,
    cross_entropy_sum,
    dense_jsd,
    dense_teacher_ce,
    logits_l2,
    sampled_kl,
    sparse_reverse_kl,
    sparse_teacher_ce,
)
from matvlm.recipes import RecipeError, parse_recipe

POSITIONS, WIDTH, VOCABULARY = 10, 32, 40
DIVISORS = Divisors(positions=7, labels=5, tokens=100)


@pytest.fixture(scope="module")
def model() -> Any:
    """A family that soft-caps its logits, frozen; its head is loud enough to be capped."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, head_dim=16, final_logit_softcapping=3.0, **sizes)
    built = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    built.lm_head.weight.mul_(20)
    return built


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    """The student's and the teacher's last hidden states [P, H], and labels [P] of which some count nothing."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, POSITIONS, WIDTH, generator=generator)
    labels = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    labels[::3] = IGNORE
    return student.requires_grad_(), teacher, labels


def capped(model: Any, hidden: Tensor) -> Tensor:
    return 3.0 * torch.tanh(hidden @ model.lm_head.weight.T / 3.0)


@pytest.mark.parametrize("chunk", [1, 3, POSITIONS, 1000])
@pytest.mark.parametrize("targets", ["cached", "online"])
def test_parts_add_up_to_the_whole(model: Any, states: tuple[Tensor, Tensor, Tensor], targets: str, chunk: int) -> None:
    student, hidden, labels = states
    logits, expected = capped(model, student), capped(model, hidden)
    assert 2.0 < expected.abs().max() < 3.0, "the cap matters"
    if targets == "cached":
        settings = Loss(prob=0.7, divergence="reverse_kl", ce=0.3, ce_teacher=0.2, temperature=2.0)
        kept = expected.topk(4).indices
        side: Any = Cached(kept, *bucket_logprobs(expected / 2.0, kept))
        terms = {
            "loss_prob": 0.7 * sparse_reverse_kl(logits, side.token_ids, side.logprobs, side.tail, 2.0) / 7,
            "loss_ce_teacher": 0.2 * sparse_teacher_ce(logits, side.token_ids, side.logprobs) / 7,
        }
    else:
        settings = Loss(
            prob=0.7, divergence="jsd", ce=0.3, ce_teacher=0.2, logits_l2=0.1, temperature=2.0, targets="online"
        )
        side = Online(model, hidden)
        terms = {
            "loss_prob": 0.7 * dense_jsd(expected, logits, 2.0) / 7,
            "loss_ce_teacher": 0.2 * dense_teacher_ce(expected, logits) / 7,
            "loss_logits_l2": 0.1 * logits_l2(expected, logits) / 7,
        }
    terms["loss_ce"] = 0.3 * cross_entropy_sum(logits, labels) / 5
    whole = torch.stack(list(terms.values())).sum()
    (gradient,) = torch.autograd.grad(whole, student)
    loss, found = logit_losses(settings, model, student, labels, side, DIVISORS, chunk)
    # Measured: 7e-7 apart (losses, relative) and 2e-8 (gradients, up to 0.06).
    assert found.keys() == terms.keys()
    for name, value in terms.items():
        assert found[name].item() == pytest.approx(value.item(), rel=2e-6)
        assert not found[name].requires_grad
    assert loss.item() == pytest.approx(whole.item(), rel=2e-6)
    (3 * loss).backward()
    assert student.grad is not None
    assert gradient.abs().max() > 0.01
    torch.testing.assert_close(student.grad, 3 * gradient, rtol=1e-5, atol=5e-7)


def test_the_logits_of_a_part_are_gone_before_the_next(model: Any, states: tuple[Tensor, Tensor, Tensor]) -> None:
    student, hidden, labels = states
    alive: list[Any] = []
    rows = []

    def watch(_module: Any, _inputs: Any, logits: Tensor) -> None:
        rows.append(logits.shape[1])
        assert sum(reference() is not None for reference in alive) <= (len(alive) % 2)
        alive.append(weakref.ref(logits))

    hook = model.lm_head.register_forward_hook(watch)
    loss, _ = logit_losses(Loss(targets="online"), model, student, labels, Online(model, hidden), DIVISORS, chunk=4)
    hook.remove()
    assert rows == [4, 4, 4, 4, 2, 2], "student and teacher, part by part"
    assert all(reference() is None for reference in alive), "the loss keeps none of them"
    loss.backward()


def test_without_gradient_and_without_positions(model: Any, states: tuple[Tensor, Tensor, Tensor]) -> None:
    student, hidden, labels = states
    settings, side = Loss(targets="online"), Online(model, hidden)
    with torch.no_grad():
        loss, _ = logit_losses(settings, model, student, labels, side, DIVISORS)
    assert loss.item() == pytest.approx(
        logit_losses(settings, model, student, labels, side, DIVISORS)[0].item(), rel=1e-6
    )
    assert not loss.requires_grad
    nothing, terms = logit_losses(settings, model, student[:0], labels[:0], Online(model, hidden[:0]), DIVISORS)
    nothing.backward()
    assert (nothing.item(), terms) == (0.0, {})
    assert student.grad is not None
    assert student.grad.abs().max() == 0


def test_counts_of_the_whole_batch() -> None:
    first = torch.tensor([[IGNORE, IGNORE, 5, 6], [IGNORE, 7, IGNORE, IGNORE]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batches = [
        Batch(["a", "b"], {"input_ids": first, "attention_mask": mask}, first),
        Batch(["c"], {"input_ids": first[1:], "attention_mask": mask[1:]}, first[1:]),
    ]
    assert Divisors.of([Counts.of(batches[:1]), Counts.of(batches[1:])], "positions") == Divisors(
        positions=4, labels=4, tokens=8
    )
    assert Divisors.of([Counts.of(batches)], "paper") == Divisors(positions=3, labels=3, tokens=3)


def test_draws_are_used_for_the_kl(model: Any, states: tuple[Tensor, Tensor, Tensor]) -> None:
    student, hidden, labels = states
    expected = capped(model, hidden)
    kept, drawn = expected.topk(4).indices, expected.topk(12).indices[:, 4:]
    targets = bucket_logprobs(expected, kept)
    loss, _ = logit_losses(Loss(), model, student, labels, Cached(kept, *targets, drawn=drawn), DIVISORS, chunk=3)
    wanted = sampled_kl(capped(model, student), kept, targets[0], drawn, targets[1]) / 7
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    sampled = "targets: {scheme: topk_sampled}"
    with pytest.raises(RecipeError, match=r"divergence jsd cannot be estimated from draws: use kl, targets\.scheme"):
        parse_recipe(f"{{name: r, {sampled}, distill: {{loss: {{divergence: jsd}}}}}}")
    assert parse_recipe(f"{{name: r, {sampled}, distill: {{loss: {{divergence: jsd, targets: online}}}}}}")


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        ("{logits_l2: 0.1}", r"distill\.loss: logits_l2 needs all logits of the teacher.*set targets: online"),
        ("{prob: 0, layer: 0}", r"at least one of prob, layer, ce, ce_teacher and logits_l2 must be above 0"),
        ("{divergence: js}", r"distill\.loss\.divergence: .*'kl', 'reverse_kl' or 'jsd'.*got 'js'"),
    ],
)
def test_losses_that_cannot_be_had_are_refused(loss: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        parse_recipe(f"{{name: r, distill: {{loss: {loss}}}}}")


def test_an_older_loss_section_means_what_it_meant() -> None:
    old = {"prob": 1.0, "layer": 0.5, "ce": 0.25, "temperature": 2.0, "layer_inputs": "student_forced"}
    read = Loss.model_validate(old)
    assert read.model_dump(exclude_defaults=False).items() >= old.items()
    assert (read.divergence, read.layer_form, read.targets, read.scaling) == ("kl", "l2", "cached", "positions")
    assert read.ce_teacher == read.logits_l2 == 0
    assert Loss(prob=0, layer=0, logits_l2=1, targets="online").logits_l2 == 1
