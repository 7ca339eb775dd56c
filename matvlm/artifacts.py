"""What one stage hands to the next: small, typed, JSON-able values that name files by URI.

Nothing large travels in them. Each is a frozen pydantic model, so ``model_dump(mode="json")`` is what a flow stores as
its artifact and ``model_validate`` brings it back on any machine that can reach the URIs.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Artifact(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataManifest(Artifact):
    """Prepared training data: an Arrow data set (``datasets.save_to_disk``) at ``uri``."""

    uri: str
    num_samples: int
    num_skipped: int
    skipped: dict[str, int]
    """Why samples were skipped: reason -> count."""
    fingerprint: str
    """sha256 over ids, conversations and image bytes, in order."""


class TargetStore(Artifact):
    """Sparse teacher targets at ``uri``; its manifest.json holds shard names and checksums."""

    uri: str
    num_samples: int
    num_positions: int
    bytes_per_position: float
    kept_mass_mean: float
    """Mean probability mass of the teacher's top-k, in [0, 1]."""
    identity: str
    """sha256 of everything that decides the content (teacher, data, template, positions, scheme)."""


class Checkpoint(Artifact):
    """A model folder at ``uri`` that ``matvlm.load`` opens."""

    uri: str
    label: str
    """What the model is called in tables and plots: teacher, student, ..."""
    init: str | None = None
    layers: list[int] = []
    """Decoder layers that are Mamba-2; empty for a teacher."""
    updates: int = 0
    """Optimiser updates of distillation behind it."""
    parameters: int = 0
    trained_parameters: int = 0


class TaskScore(Artifact):
    """The one number that stands for a task, on the paper's scale: percent, and for MME the perception points / 20."""

    metric: str
    """Which of the task's metrics it is."""
    value: float
    stderr: float | None = None
    """On the same scale; None where there is no estimate."""

    def __str__(self) -> str:
        return f"{self.value:.2f}" if self.stderr is None else f"{self.value:.2f} ± {self.stderr:.2f}"


class EvalResult(Artifact):
    """Scores of one checkpoint. ``samples_uri`` is a JSONL of per-question answers."""

    label: str
    checkpoint_uri: str
    metrics: dict[str, float]
    """``task/metric`` -> value, accuracies in [0, 1]."""
    num_questions: int
    seconds: float
    samples_uri: str
    scores: dict[str, TaskScore] = {}
    """By task; a task that has no score (a judge that is not there, a split whose answers are secret) has no entry."""
    failed: dict[str, str] = {}
    """Tasks that ended with an error -> the error."""

    @property
    def mean_score(self) -> float | None:
        """The paper's mean: of every task that has a score, on the paper's scale; None where none has."""
        return sum(score.value for score in self.scores.values()) / len(self.scores) if self.scores else None


class ProfilePoint(Artifact):
    """One model at one context length. Times are medians over the recipe's repeats."""

    label: str
    context: int
    batch_size: int
    prefill_seconds: float
    decode_tokens_per_second: float
    cache_bytes: int
    """Bytes of KV cache and recurrent state at this context, measured from the cache's tensors."""
    peak_bytes: int | None = None
    """Peak device memory (GPU only)."""
    prefill_seconds_each: list[float] = []
    decode_tokens_per_second_each: list[float] = []
    """The repeats behind the two medians. Repeat i of every model was measured in the same moments."""


class ProfileResult(Artifact):
    points: list[ProfilePoint]
    machine: dict[str, str]
    repeats: int
    new_tokens: int
