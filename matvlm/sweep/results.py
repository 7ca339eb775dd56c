"""What a sweep hands on: the result of each of its points, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import Field

from matvlm.artifacts import Artifact, Checkpoint, EvalResult, ProfileResult, TaskScore


class PointResult(Artifact):
    """One point with one seed; or the teacher, which has no seed and was only evaluated."""

    name: str
    seed: int | None = None
    overrides: dict[str, Any] = Field(default={})
    """What differs from the base recipe."""
    error: str | None = None
    """Why it failed; then all that follows is empty."""
    layers: list[int] = Field(default=[])
    """Decoder layers that are Mamba-2."""
    updates: int = 0
    continued_from: int = 0
    """Updates, up to the last logged one, of an attempt that was interrupted; ``seconds`` are those of the last one."""
    seconds: dict[str, float] = Field(default={})
    """Of ``init``, ``distill`` and ``evaluate``."""
    peak_memory_bytes: int = 0
    """The highest that was logged while it was distilled: of tensors on the GPU, or of a process without one."""
    machine: str = ""
    """The GPU, or the processor."""
    trained_parameters: int = 0
    curve: list[tuple[int, float]] = Field(default=[])
    """Updates, and the KL(teacher || student) there on held-out samples, in nats per answer position."""
    final_kl: float | None = None
    """The last one of ``curve``."""
    metrics: dict[str, float] = Field(default={})
    """``task/metric`` -> value."""
    scores: dict[str, TaskScore] = Field(default={})
    """By task."""
    failed_tasks: dict[str, str] = Field(default={})
    """Tasks that could not be evaluated -> the error."""
    student: Checkpoint | None = None
    """Where the model is; None where it was not kept."""

    @property
    def mean_score(self) -> float | None:
        """Of every task that has a score."""
        return sum(score.value for score in self.scores.values()) / len(self.scores) if self.scores else None

    def evaluated(self, result: EvalResult) -> PointResult:
        """With what an evaluation says of it."""
        found = {"metrics": result.metrics, "scores": result.scores, "failed_tasks": result.failed}
        seconds = {**self.seconds, "evaluate": result.seconds}
        return self.model_copy(update={**found, "seconds": seconds})


class SweepError(ValueError):
    """A sweep without a result; the message has the error of each point."""


def refuse_none(results: Sequence[PointResult]) -> None:
    """Raise a ``SweepError`` unless one of ``results``, those of the points, is there."""
    if all(result.error for result in results):
        errors = [f"{result.name}, seed {result.seed}: {result.error}" for result in results]
        raise SweepError("\n".join(["every point failed; resuming does not try them again, a new run does", *errors]))


def students_to_profile(results: Iterable[PointResult]) -> list[Checkpoint]:
    """Of each number of mixers the first student that is there: the speed depends on nothing else."""
    first: dict[int, Checkpoint] = {}
    for result in results:
        if result.student is not None:
            first.setdefault(len(result.layers), result.student)
    return list(first.values())


class Summary(Artifact):
    """Content of ``summary.json``."""

    sweep: dict[str, Any]
    """The sweep as it was resolved, its base recipe included."""
    environment: dict[str, str]
    """Versions, git commit and machines."""
    teacher: PointResult
    points: list[PointResult]
    """In the order of the sweep, one for each point and seed."""
    profile: ProfileResult
