"""Distillation losses as pure functions.

Every loss returns the **sum** over its positions, accumulated in float32 (float64 stays float64). The trainer divides
by the number of positions over all accumulation steps and devices, so that neither length nor micro-batch nor device
count changes the loss. The terms are those of arXiv 2503.13440, ``w_prob * L_prob + w_layer * L_layer + w_ce * L_ce``.

Shapes: P kept positions, V vocabulary, k kept tokens a position, B samples, L tokens, H hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from matvlm.data.encoding import IGNORE


def bucket_logprobs(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``k`` named tokens and of all other tokens together.

    ``logprobs_i = z_i - log sum_V exp(z)`` and ``tail = log sum_(not in k) exp(z) - log sum_V exp(z)``. The tail is
    summed directly, never as ``1 - sum(kept)``, so it stays exact however small it is.

    Args:
        logits: [P, V], any float type.
        token_ids: int64 [P, k], distinct within a position.

    Returns:
        ``logprobs`` [P, k] and ``tail`` [P], float32 (float64 for float64 logits); the tail of k = V is -inf.
    """
    logits = _wide(logits)
    norm = logits.logsumexp(-1)
    logprobs = logits.gather(-1, token_ids) - norm[:, None]
    if token_ids.shape[-1] >= logits.shape[-1]:
        return logprobs, torch.full_like(norm, -torch.inf)
    tail = logits.scatter(-1, token_ids, -torch.inf).logsumexp(-1) - norm
    return logprobs, tail


def sparse_kl(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student) over k + 1 buckets, the teacher's top-k tokens and the rest as one; summed over positions.

    ``sum_P [ sum_(i in k) p_i (log p_i - log q_i) + p_tail (log p_tail - log q_tail) ]`` with
    ``q = softmax(logits / temperature)``: a lower bound of the KL over the whole vocabulary, equal to it for k = V.
    There is no ``temperature ** 2`` factor.

    Args:
        logits: the student's, [P, V].
        token_ids: int64 [P, k].
        logprobs: the teacher's log-probabilities of ``token_ids`` **at the same temperature**, [P, k].
        tail_logprob: log of the teacher's remaining mass, [P]; -inf where nothing remains.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if token_ids.shape != logprobs.shape or not len(logits) == len(token_ids) == len(tail_logprob):
        shapes = [tuple(t.shape) for t in (logits, token_ids, logprobs, tail_logprob)]
        raise ValueError(
            f"logits, token_ids, logprobs and tail_logprob must share their positions, got shapes {shapes}"
        )
    student, student_tail = bucket_logprobs(_wide(logits) / temperature, token_ids)
    teacher, teacher_tail = _wide(logprobs), _wide(tail_logprob)
    return _divergence(teacher, student).sum() + _divergence(teacher_tail, student_tail).sum()


def dense_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``sum_P sum_V p (log p - log q)``: KL(teacher || student) of two [P, V] logits, summed over positions."""
    teacher, student = _wide(teacher_logits).log_softmax(-1), _wide(student_logits).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """``-sum_P log q(label)`` of [P, V] logits and int64 [P] labels; positions labelled ``IGNORE`` count nothing."""
    return F.cross_entropy(_wide(logits), labels, ignore_index=IGNORE, reduction="sum")


def layer_l2(student_out: Tensor, teacher_out: Tensor, mask: Tensor) -> Tensor:
    """``sum_(mask) mean_H (student - teacher)^2``: the layer loss of one replaced layer.

    Args:
        student_out: the mixer's output, [B, L, H].
        teacher_out: the original attention's output for the same input, [B, L, H].
        mask: bool [B, L], True at real tokens. Masked positions are never read, so whatever stands there is harmless.
    """
    return (_wide(student_out[mask]) - _wide(teacher_out[mask])).square().mean(-1).sum()


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """``p (log p - log q)`` of log-probabilities, 0 where p is 0."""
    return torch.where(teacher == -torch.inf, 0.0, teacher.exp() * (teacher - student))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
