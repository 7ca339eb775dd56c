"""How far the gradient of the loss with sparse targets is from that with all of the teacher's logits, on real batches.

Shapes: P kept positions of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from matvlm.artifacts import Artifact
from matvlm.config import Targets
from matvlm.data.encoding import Batch, Encoder
from matvlm.data.prepare import encode_rows
from matvlm.losses import dense_kl
from matvlm.reporting import Reporter
from matvlm.storage import join, write_json
from matvlm.targets.compute import ShardMaker
from matvlm.targets.identity import Identity
from matvlm.targets.store import TargetReader
from matvlm.teacher import kept_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT = "gradient_error.json"
OTHER = {
    "topk_tail": {"scheme": "topk_tail", "top_k": 32, "samples": None, "seed": None},
    "topk_sampled": {"scheme": "topk_sampled", "top_k": 16, "samples": 16, "seed": 0},
}
"""What a store is held against: the other scheme in its usual size."""


class GradientError(Artifact):
    """Errors of d loss / d logits of one scheme, relative to the norm of the exact gradient: 0 is exact."""

    scheme: str
    top_k: int
    samples: int | None
    mean: float
    """L2 error of a position's gradient, mean over positions."""
    pooled: float
    """L2 error over all positions together, so positions count by their gradients."""
    summed: float
    """L2 error of the gradient summed over the positions: what is left when noise averages out."""


class GradientReport(Artifact):
    """Content of ``gradient_error.json``: the store's own scheme first, then the other one."""

    num_samples: int
    num_positions: int
    errors: list[GradientError]


def check_gradients(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    encoder: Encoder,
    rows: Any,
    batch_size: int,
    uri: str,
    reader: TargetReader,
    identity: Identity,
    reporter: Reporter | None = None,
) -> GradientReport:
    """Hold the finished store at ``uri``, and the other scheme, against dense targets; writes and reports the result.

    Args:
        student: at whose output the gradients are taken; its frozen weights are the teacher's.
        rows: the data set's rows to do it on.
        reader: of the store at ``uri``, whose identity is ``identity``.
    """
    other = OTHER["topk_tail" if identity.scheme == "topk_sampled" else "topk_sampled"]
    run = identity.model_copy(update=other)
    with TemporaryDirectory() as folder:
        settings = Targets(shards=1, batch_size=batch_size)
        readers = [reader, TargetReader(folder, ShardMaker(teacher, encoder, rows, settings, folder, run).make([0]))]
        sums = [_Errors(), _Errors()]
        for start in range(0, len(rows), batch_size):
            chunk = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = encode_rows(encoder, chunk).to(student.device)
            exact, *sparse = _gradients(teacher, student, batch, readers, identity.temperature)
            for errors, gradient in zip(sums, sparse, strict=True):
                errors.add(gradient, exact)
    report = GradientReport(
        num_samples=len(rows),
        num_positions=sums[0].positions,
        errors=[errors.result(made) for errors, made in zip(sums, (identity, run), strict=True)],
    )
    write_json(join(uri, REPORT), report.model_dump(mode="json"))
    (reporter or Reporter()).metrics({f"targets/gradient_error/{error.scheme}": error.mean for error in report.errors})
    return report


def _gradients(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batch: Batch,
    readers: Sequence[TargetReader],
    temperature: float,
) -> Iterator[Tensor]:
    """d loss / d logits [P, V] of dense targets, then of each reader's."""
    with torch.inference_mode():
        exact, logits = kept_logits(teacher, batch), kept_logits(student, batch)
    exact, logits = exact.double(), logits.double().requires_grad_()
    losses: list[Callable[[], Tensor]] = [lambda: dense_kl(exact / temperature, logits / temperature)]
    losses += [lambda reader=reader: reader.kl(logits, batch.ids, temperature) for reader in readers]  # type: ignore[misc]
    for loss in losses:
        yield torch.autograd.grad(loss(), logits)[0]


class _Errors:
    """Sums over the positions seen so far."""

    def __init__(self) -> None:
        self.positions, self.relative, self.squared, self.exact_squared = 0, 0.0, 0.0, 0.0
        self.sum_difference: Tensor | float = 0.0
        self.sum_exact: Tensor | float = 0.0

    def add(self, gradient: Tensor, exact: Tensor) -> None:
        difference = gradient - exact
        tiny = torch.finfo(exact.dtype).tiny
        self.positions += len(exact)
        self.relative += float((difference.norm(dim=-1) / exact.norm(dim=-1).clamp(min=tiny)).sum())
        self.squared += float(difference.square().sum())
        self.exact_squared += float(exact.square().sum())
        self.sum_difference = self.sum_difference + difference.sum(0)
        self.sum_exact = self.sum_exact + exact.sum(0)

    def result(self, made: Identity) -> GradientError:
        return GradientError(
            scheme=made.scheme,
            top_k=made.top_k,
            samples=made.samples,
            mean=self.relative / self.positions,
            pooled=(self.squared / self.exact_squared) ** 0.5,
            summed=float(torch.as_tensor(self.sum_difference).norm() / torch.as_tensor(self.sum_exact).norm()),
        )
