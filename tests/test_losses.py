"""Distillation losses against hand-computed values, an independent dense computation and numeric gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from matvlm.data.encoding import IGNORE
from matvlm.losses import bucket_logprobs, cross_entropy_sum, dense_kl, layer_l2, sparse_kl

POSITIONS, VOCABULARY = 6, 11


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


def test_losses_vanish_for_equal_distributions(logits: tuple[Tensor, Tensor]) -> None:
    teacher, _ = logits
    shifted = (teacher + 3.0).requires_grad_()
    loss = sparse_kl(shifted, *top(teacher, 3)) + dense_kl(teacher, shifted)
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
