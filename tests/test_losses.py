"""Distillation losses against hand-computed values, an independent dense computation and numeric gradients."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from matvlm.data.encoding import IGNORE
from matvlm.losses import (
    bucket_logprobs,
    cross_entropy_sum,
    dense_jsd,
    dense_kl,
    dense_reverse_kl,
    dense_teacher_ce,
    layer_cosine,
    layer_l2,
    logits_l2,
    sparse_jsd,
    sparse_kl,
    sparse_reverse_kl,
    sparse_teacher_ce,
)

POSITIONS, VOCABULARY = 6, 11
FORMS = [(sparse_kl, dense_kl), (sparse_reverse_kl, dense_reverse_kl), (sparse_jsd, dense_jsd)]
"""Each divergence on buckets and on the whole vocabulary."""


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    """Teacher's and student's [P, V] logits, float64."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, POSITIONS, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    return teacher, student


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = teacher.topk(k).indices
    return ids, *bucket_logprobs(teacher, ids)


def merged_kl(teacher: Tensor, student: Tensor, ids: Tensor) -> float:
    """The bucket KL straight from its definition: probabilities of merged outcomes, one position at a time."""
    total = 0.0
    for p, q, kept in zip(teacher.softmax(-1).tolist(), student.softmax(-1).tolist(), ids.tolist(), strict=True):
        rest = set(range(len(p))) - set(kept)
        total += sum(p[i] * math.log(p[i] / q[i]) for i in kept)
        p_tail, q_tail = sum(p[i] for i in rest), sum(q[i] for i in rest)
        total += p_tail * math.log(p_tail / q_tail) if rest else 0.0
    return total


def test_sparse_kl_by_hand() -> None:
    # teacher (1/2, 1/4, 1/8, 1/8), student uniform, k = 1: 1/2 ln 2 + 1/2 ln(1/2 / 3/4)
    student = torch.zeros(1, 4, requires_grad=True)
    half = torch.log(torch.tensor([0.5]))
    loss = sparse_kl(student, torch.tensor([[0]]), half[None], half)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    loss.backward()
    # dL/dz = q - (p of the bucket, shared out inside it as q is): (1/4 - 1/2, 1/4 - 1/6, ...)
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([-1 / 4, 1 / 12, 1 / 12, 1 / 12], abs=1e-7)


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1, VOCABULARY])
def test_sparse_kl_is_the_kl_of_merged_outcomes(logits: tuple[Tensor, Tensor], k: int) -> None:
    teacher, student = logits
    targets = top(teacher, k)
    assert sparse_kl(student, *targets).item() == pytest.approx(merged_kl(teacher, student, targets[0]), rel=1e-12)


def test_sparse_kl_approaches_the_dense_kl_from_below(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    dense = dense_kl(teacher, student).item()
    by_k = [sparse_kl(student, *top(teacher, k)).item() for k in range(1, VOCABULARY + 1)]
    # k = V - 1 and k = V are the same partition, equal up to rounding.
    assert all(more > less - 1e-12 for less, more in pairwise(by_k))
    assert by_k[0] < 0.9 * dense
    assert by_k[-1] == pytest.approx(dense, rel=1e-12)


@pytest.mark.parametrize(("sparse", "dense"), FORMS)
def test_the_sparse_form_bounds_the_dense_one_and_meets_it(
    logits: tuple[Tensor, Tensor], sparse: Any, dense: Any
) -> None:
    teacher, student = (values.clone().requires_grad_() for values in logits)
    whole = dense(teacher, student, temperature=1.7)
    by_k = {k: sparse(student, *top(teacher.detach() / 1.7, k), temperature=1.7) for k in (1, 4, VOCABULARY)}
    assert 0 < by_k[1].item() < by_k[4].item() < whole.item()
    assert by_k[VOCABULARY].item() == pytest.approx(whole.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (by_k[VOCABULARY], whole)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sparse", "dense"), FORMS)
def test_divergences_have_the_gradient_that_numbers_say(logits: tuple[Tensor, Tensor], sparse: Any, dense: Any) -> None:
    teacher, student = logits
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dense(teacher, z, temperature=1.7), student)
    for k in (1, 4, VOCABULARY):
        targets = top(teacher / 1.7, k)
        assert torch.autograd.gradcheck(lambda z, targets=targets: sparse(z, *targets, temperature=1.7), student)


def test_divergences_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), m = (3/8, 3/8, 1/4)
    teacher, student = torch.log(torch.tensor([[0.5, 0.25, 0.25]])), torch.log(torch.tensor([[0.25, 0.5, 0.25]])) + 5
    ln = math.log
    assert dense_kl(teacher, student).item() == pytest.approx(ln(2) / 4, abs=1e-6)
    # Only q = (1/4, 3/4) in two buckets tells the directions apart: p = (1/2, 1/2).
    ids, logprobs, tail = torch.tensor([[0]]), teacher[:, :1], teacher[:, 0]
    forward, reverse = 0.5 * ln(0.5 / 0.25) + 0.5 * ln(0.5 / 0.75), 0.25 * ln(0.25 / 0.5) + 0.75 * ln(0.75 / 0.5)
    middle = [(0.5 + 0.25) / 2, (0.5 + 0.75) / 2]
    shannon = sum(p * ln(p / m) + q * ln(q / m) for p, q, m in zip((0.5, 0.5), (0.25, 0.75), middle, strict=True)) / 2
    assert sparse_kl(student, ids, logprobs, tail).item() == pytest.approx(forward, abs=1e-6)
    assert sparse_reverse_kl(student, ids, logprobs, tail).item() == pytest.approx(reverse, abs=1e-6)
    assert sparse_jsd(student, ids, logprobs, tail).item() == pytest.approx(shannon, abs=1e-6)
    by_hand = (0.5 * ln(0.5 / 0.375) + 0.25 * ln(0.25 / 0.375)) / 2 * 2
    assert dense_jsd(teacher, student).item() == pytest.approx(by_hand, abs=1e-6)
    assert dense_reverse_kl(teacher, 2 * teacher).item() == pytest.approx(
        2 / 3 * ln(2 / 3 / 0.5) + 1 / 3 * ln(1 / 6 / 0.25), abs=1e-6
    )


def test_jensen_shannon_is_symmetric_and_at_most_ln_2(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    assert dense_jsd(teacher, student).item() == pytest.approx(dense_jsd(student, teacher).item(), rel=1e-12)
    apart = torch.tensor([[500.0, 0.0], [0.0, 500.0]])
    assert dense_jsd(apart, apart.flip(0)).item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert dense_kl(teacher, student).item() != pytest.approx(dense_kl(student, teacher).item(), rel=0.01)


@pytest.mark.parametrize(("sparse", "dense"), FORMS)
def test_outcomes_without_mass_are_harmless(sparse: Any, dense: Any) -> None:
    impossible = torch.tensor([[0.0, 1.0, -torch.inf]])
    student = torch.tensor([[0.5, 0.0, -40.0]], requires_grad=True)
    kept = torch.tensor([[0, 1]])
    loss = sparse(student, kept, impossible[:, :2].log_softmax(-1), torch.tensor([-torch.inf]))
    if sparse is sparse_reverse_kl:
        assert loss.item() == torch.inf
        return
    loss = loss + dense(impossible, student)
    loss.backward()
    assert 0 < loss.item() < 1
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_cross_entropy_with_the_teachers_choice(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    student.requires_grad_()
    expected = -sum(
        math.log(q[p.index(max(p))]) for p, q in zip(teacher.tolist(), student.softmax(-1).tolist(), strict=True)
    )
    dense = dense_teacher_ce(teacher, student)
    assert dense.item() == pytest.approx(expected, rel=1e-12)
    ids, logprobs, _ = top(teacher, 4)
    backwards = sparse_teacher_ce(student, ids.flip(-1), logprobs.flip(-1))
    assert backwards.item() == pytest.approx(expected, rel=1e-12), "wherever the best one stands"
    assert torch.autograd.gradcheck(lambda z: dense_teacher_ce(teacher, z), student)
    assert torch.autograd.gradcheck(lambda z: sparse_teacher_ce(z, ids, logprobs), student)


def test_logits_l2_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert logits_l2(teacher, student).item() == (1 + 4) / 2 + 9 / 2
    assert torch.autograd.gradcheck(lambda z: logits_l2(teacher, z), student)


def test_layer_cosine_by_hand_and_blind_to_padding_and_size() -> None:
    mask = torch.tensor([[True, True, True, False]])
    student = torch.tensor([[[3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [torch.nan, torch.inf]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [0.0, -1.0], [0.0, 0.0]]], dtype=torch.float64)
    student.requires_grad_()
    loss = layer_cosine(student, teacher, mask)
    assert loss.item() == pytest.approx(0 + (1 - math.sqrt(0.5)) + 2, rel=1e-12)
    loss.backward()
    assert student.grad is not None
    assert student.grad[0, 3].tolist() == [0.0, 0.0]
    # d(1 - cos)/ds = -(t/|t| - cos s/|s|) / |s| at s = (1, 1), t = (5, 0)
    assert student.grad[0, 1].tolist() == pytest.approx([-0.5 / math.sqrt(2), 0.5 / math.sqrt(2)], rel=1e-12)
    whole = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = torch.randn(1, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda s: layer_cosine(s, other, mask), whole)


def test_losses_vanish_for_equal_distributions(logits: tuple[Tensor, Tensor]) -> None:
    teacher, _ = logits
    shifted = (teacher + 3.0).requires_grad_()
    loss = sum(
        (sparse(shifted, *top(teacher, 3)) + dense(teacher, shifted) for sparse, dense in FORMS), torch.zeros(())
    )
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert shifted.grad is not None
    assert shifted.grad.abs().max() < 1e-12


@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_gradients_numerically(logits: tuple[Tensor, Tensor], k: int) -> None:
    teacher, student = logits
    targets = top(teacher / 1.7, k)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sparse_kl(z, *targets, temperature=1.7), student)
    assert torch.autograd.gradcheck(lambda z: dense_kl(teacher, z), student)


def test_temperature_divides_the_students_logits(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    warm = sparse_kl(student, *top(teacher / 2, 4), temperature=2.0)
    assert warm.item() == pytest.approx(merged_kl(teacher / 2, student / 2, teacher.topk(4).indices), rel=1e-12)


def test_no_teacher_mass_in_the_tail_is_harmless(logits: tuple[Tensor, Tensor]) -> None:
    _, student = logits
    student.requires_grad_()
    ids = torch.tensor([[2, 5]]).expand(POSITIONS, 2)
    logprobs = torch.log(torch.tensor([0.25, 0.75])).expand(POSITIONS, 2)
    loss = sparse_kl(student, ids, logprobs, torch.full((POSITIONS,), -torch.inf))
    loss.backward()
    q = student.detach().softmax(-1)
    expected = (0.25 * (0.25 / q[:, 2]).log() + 0.75 * (0.75 / q[:, 5]).log()).sum()
    # The target probabilities are float32, good to 6e-8.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_tiny_tail_keeps_its_digits() -> None:
    # In float32, 1 - sum(kept) would be 0 here; the true tail mass is 3 e^-40 / (1 + 3 e^-40).
    _, tail = bucket_logprobs(torch.tensor([[40.0, 0.0, 0.0, 0.0]]), torch.tensor([[0]]))
    assert tail.item() == pytest.approx(math.log(3) - 40, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4000, VOCABULARY, generator=generator).to(dtype)
    targets = top(torch.randn(4000, VOCABULARY, generator=generator), 4)
    labels = torch.zeros(4000, dtype=torch.int64)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    for loss, exact in [
        (sparse_kl(student, *targets), sparse_kl(student.double(), *targets)),
        (sparse_jsd(student, *targets), sparse_jsd(student.double(), *targets)),
        (sparse_reverse_kl(student, *targets), sparse_reverse_kl(student.double(), *targets)),
        (logits_l2(student * 0, student), logits_l2(student * 0, student.double())),
        (cross_entropy_sum(student, labels), cross_entropy_sum(student.double(), labels)),
        (layer_l2(student[None], student[None] * 0, mask), layer_l2(student[None].double(), student[None] * 0, mask)),
    ]:
        assert loss.dtype == torch.float32
        # Measured: at most 1e-7. Summed in the logits' own type the error would be 2e-4 to 1e-3.
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_cross_entropy_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]))
    loss = cross_entropy_sum(logits, torch.tensor([0, 2, IGNORE]))
    assert loss.item() == pytest.approx(-math.log(0.5) - math.log(0.8), rel=1e-6)


def test_layer_l2_by_hand_and_blind_to_padding() -> None:
    student = torch.tensor([[[1.0, 2.0], [3.0, 3.0], [torch.nan, torch.inf]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 0.0], [3.0, 5.0], [0.0, 0.0]]])
    loss = layer_l2(student, teacher, torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx((1 + 4) / 2 + 4 / 2)
    loss.backward()
    # dL/ds = 2 (s - t) / H
    assert student.grad is not None
    assert student.grad.tolist() == [[[1.0, 2.0], [0.0, -2.0], [0.0, 0.0]]]


def test_sums_add_up_over_micro_batches(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    targets = top(teacher, 4)
    parts = sum(sparse_kl(student[rows], *(t[rows] for t in targets)) for rows in (slice(0, 2), slice(2, None)))
    assert isinstance(parts, Tensor)
    assert parts.item() == pytest.approx(sparse_kl(student, *targets).item(), rel=1e-12)
    assert sparse_kl(student[:0], *(t[:0] for t in targets)).item() == 0.0


def test_positions_that_do_not_match_are_refused(logits: tuple[Tensor, Tensor]) -> None:
    teacher, student = logits
    with pytest.raises(ValueError, match=r"share their positions.*\(6, 11\).*\(5, 4\)"):
        sparse_kl(student, *top(teacher[:5], 4))
