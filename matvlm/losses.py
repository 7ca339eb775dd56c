"""Distillation losses as pure functions.

Every loss returns the **sum** over its positions, accumulated in float32 (float64 stays float64). The trainer divides
by the number of positions over all accumulation steps and devices, so that neither length nor micro-batch nor device
count changes the loss. The terms are those of arXiv 2503.13440, ``w_prob * L_prob + w_layer * L_layer + w_ce * L_ce``.

A divergence between teacher ``p`` and student ``q`` has two forms. ``dense_*`` takes the logits of both. ``sparse_*``
takes what a target store keeps of the teacher and compares k + 1 buckets, the kept tokens and all others as one;
merging outcomes never makes a divergence larger, so it is a lower bound of the dense form and equal to it for k = V.
The temperature divides the logits; there is no ``temperature ** 2`` factor.

Shapes: P kept positions, V vocabulary, k kept tokens a position, B samples, L tokens, H hidden size.
"""

from __future__ import annotations

import math

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
    ``q = softmax(logits / temperature)``.

    Args:
        logits: the student's, [P, V].
        token_ids: int64 [P, k].
        logprobs: the teacher's log-probabilities of ``token_ids`` **at the same temperature**, [P, k].
        tail_logprob: log of the teacher's remaining mass, [P]; -inf where nothing remains.

    Raises:
        ValueError: the shapes do not belong together.
    """
    return _kl(*_buckets(logits, token_ids, logprobs, tail_logprob, temperature)).sum()


def sampled_kl(
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    sampled_ids: Tensor,
    tail_logprob: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """KL(teacher || student) over the whole vocabulary, estimated: the top-k exactly, the rest by S draws from it.

    ``sum_P [ sum_(i in k) p_i (log p_i - log q_i) + p_tail (log p_tail - 1/S sum_s log q(x_s)) ]`` with the ``x_s``
    drawn from the teacher's tail (compare arXiv 2503.16870). In the mean over the draws its gradient
    is that of ``dense_kl``, and its value ``dense_kl`` plus ``p_tail`` times the tail's entropy, a constant.

    Args:
        sampled_ids: int64 [P, S]; a token may occur several times.

    The other arguments and the errors are those of ``sparse_kl``.
    """
    if token_ids.shape != logprobs.shape or len({len(t) for t in (logits, token_ids, sampled_ids, tail_logprob)}) > 1:
        shapes = [tuple(t.shape) for t in (logits, token_ids, logprobs, sampled_ids, tail_logprob)]
        raise ValueError(
            f"logits, token_ids, logprobs, sampled_ids and tail_logprob must share their positions, got shapes {shapes}"
        )
    scaled, teacher_tail = _wide(logits) / temperature, _wide(tail_logprob)
    norm = scaled.logsumexp(-1, keepdim=True)
    exact = _kl(_wide(logprobs), scaled.gather(-1, token_ids) - norm)
    drawn = (scaled.gather(-1, sampled_ids) - norm).mean(-1)
    return exact.sum() + _kl(teacher_tail, drawn).sum()


def sparse_reverse_kl(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, temperature: float = 1.0
) -> Tensor:
    """KL(student || teacher) over k + 1 buckets, ``sum_P sum_b q_b (log q_b - log p_b)`` (arXiv 2306.08543).

    Arguments and errors are those of ``sparse_kl``. Infinite where the teacher has no mass and the student has some.
    """
    teacher, student = _buckets(logits, token_ids, logprobs, tail_logprob, temperature)
    return _kl(student, teacher).sum()


def sparse_jsd(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, temperature: float = 1.0
) -> Tensor:
    """Jensen-Shannon divergence over k + 1 buckets: the equation of ``dense_jsd``, all else as in ``sparse_kl``."""
    return _jensen_shannon(*_buckets(logits, token_ids, logprobs, tail_logprob, temperature)).sum()


def sparse_teacher_ce(logits: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
    """``-sum_P log q(argmax p)``: cross entropy with the teacher's most likely token, the best of ``token_ids``.

    Shapes as in ``sparse_kl``; no temperature.
    """
    return cross_entropy_sum(logits, token_ids.gather(-1, logprobs.argmax(-1, keepdim=True))[:, 0])


def dense_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_P sum_V p (log p - log q)``: KL(teacher || student) of two [P, V] logits, summed over positions."""
    return _kl(_logprobs(teacher_logits, temperature), _logprobs(student_logits, temperature)).sum()


def dense_reverse_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_P sum_V q (log q - log p)``: KL(student || teacher) of two [P, V] logits (arXiv 2306.08543)."""
    return _kl(_logprobs(student_logits, temperature), _logprobs(teacher_logits, temperature)).sum()


def dense_jsd(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``sum_P (KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``, of two [P, V] logits; at most ln 2 a position.

    The generalised divergence of arXiv 2306.13649 at beta = 1/2.
    """
    return _jensen_shannon(_logprobs(teacher_logits, temperature), _logprobs(student_logits, temperature)).sum()


def dense_teacher_ce(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``-sum_P log q(argmax p)`` of two [P, V] logits: cross entropy with the teacher's most likely token."""
    return cross_entropy_sum(student_logits, teacher_logits.argmax(-1))


def logits_l2(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """``sum_P mean_V (z_student - z_teacher)^2`` of two [P, V] logits as they are, no temperature (arXiv 1312.6184)."""
    return (_wide(student_logits) - _wide(teacher_logits)).square().mean(-1).sum()


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
    difference = _wide(student_out) - _wide(teacher_out)
    return difference.masked_fill(~mask[..., None], 0.0).square().mean(-1).sum()


def layer_cosine(student_out: Tensor, teacher_out: Tensor, mask: Tensor) -> Tensor:
    """``sum_(mask) (1 - cos(student, teacher))``, the angle between outputs whatever their size (arXiv 1910.01108).

    Arguments as in ``layer_l2``.
    """
    hidden = ~mask[..., None]
    student, teacher = (_wide(output).masked_fill(hidden, 0.0) for output in (student_out, teacher_out))
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).masked_fill(~mask, 0.0).sum()


def _buckets(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, tail_logprob: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Teacher's and student's log-probabilities of the k kept tokens and the tail, both [P, k + 1]."""
    if token_ids.shape != logprobs.shape or not len(logits) == len(token_ids) == len(tail_logprob):
        shapes = [tuple(t.shape) for t in (logits, token_ids, logprobs, tail_logprob)]
        raise ValueError(
            f"logits, token_ids, logprobs and tail_logprob must share their positions, got shapes {shapes}"
        )
    student, student_tail = bucket_logprobs(_wide(logits) / temperature, token_ids)
    teacher = torch.cat([_wide(logprobs), _wide(tail_logprob)[:, None]], dim=-1)
    return teacher, torch.cat([student, student_tail[:, None]], dim=-1)


def _logprobs(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(-1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """``a (log a - log b)`` of log-probabilities, 0 where a is 0."""
    return first.exp() * (first - second).masked_fill(first == -torch.inf, 0.0)


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    middle = torch.logaddexp(first, second) - math.log(2)
    return (_kl(first, middle) + _kl(second, middle)) / 2


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
