"""What one stage hands to the next: small, typed, JSON-able values that name files by URI.

Nothing large travels in them. Each is a frozen pydantic model, so ``model_dump(mode="json")`` is what a flow stores as
its artifact and ``model_validate`` brings it back on any machine that can reach the URIs.
"""

from __future__ import annotations

import statistics
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


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


class Repeats(Artifact):
    """One quantity, measured several times. Repeat i of every model and stack at a point is of the same moments."""

    each: Annotated[list[float], Field(min_length=1)]

    @property
    def median(self) -> float:
        return statistics.median(self.each)

    @property
    def low(self) -> float:
        return min(self.each)

    @property
    def high(self) -> float:
        return max(self.each)


class Memory(Artifact):
    """Bytes that a model alone needs at a point, on a stack."""

    weights: int
    kv: int
    """Keys and values of all sequences at the end, from the tensors that hold them; allocated, if in advance."""
    state: int
    """Recurrent and convolution states of the mixers."""
    peak_allocated: int | None = None
    """At its highest, of what PyTorch had given out (GPU only)."""
    peak_reserved: int | None = None
    """The same of what PyTorch had taken from the device; recorded graphs keep their memory there (GPU only)."""

    @property
    def cache(self) -> int:
        return self.kv + self.state

    @property
    def rest(self) -> int | None:
        """Activations, buffers and copies: of the peak what is neither weights nor cache."""
        return None if self.peak_allocated is None else self.peak_allocated - self.weights - self.cache


class Measurement(Artifact):
    prefill_seconds: Repeats
    first_token_seconds: Repeats
    decode_tokens_per_second: Repeats
    """Of the whole batch, after the first token."""
    total_seconds: Repeats
    """From the prompt to the last token."""
    setup_seconds: float
    """What the first call took beyond a later one: compiling, recording, allocating."""
    memory: Memory


class ProfilePoint(Artifact):
    """One model on one stack, for one length of prompt, one of answers and one batch size."""

    label: str
    stack: str
    """``engine``, ``hf`` or ``hf_static``."""
    prompt: int
    new_tokens: int
    batch_size: int
    step_bytes: int
    """What a decode step has to move, in the middle of the answer; see ``matvlm.costs``."""
    floor_tokens_per_second: float
    """The most that the measured bandwidth allows then, for the whole batch."""
    measured: Measurement | None = None
    """None: the memory was not enough."""

    @property
    def place(self) -> tuple[int, int, int]:
        """(prompt, new tokens, batch size), which points are compared at."""
        return self.prompt, self.new_tokens, self.batch_size

    @property
    def share_of_floor(self) -> float | None:
        if self.measured is None:
            return None
        return self.measured.decode_tokens_per_second.median / self.floor_tokens_per_second


class ProfileResult(Artifact):
    """Models side by side; the first point's model is what the others are held against."""

    points: list[ProfilePoint]
    machine: dict[str, str]
    repeats: int
    bandwidth: float
    """Bytes a second, read and written, of a copy on the device."""

    @property
    def baseline(self) -> str:
        return self.points[0].label

    @property
    def stack(self) -> str:
        """On which models are compared: the engine, if it was measured."""
        stacks = [point.stack for point in self.points]
        return "engine" if "engine" in stacks else stacks[0]
