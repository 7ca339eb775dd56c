"""``profile``: speed and memory of several models, measured side by side in one process on one stack.

Every model runs the same loop: a fresh ``DynamicCache``, one forward pass of its decoder over ``context`` tokens
(prefill), then greedy decoding one token at a time. The tokens are random, but the same for all models of one
vocabulary: speed and memory do not depend on what a text says. An image would only be so many more tokens of context;
the vision tower, which teacher and hybrid share, is not part of the figures. Models take turns within every repeat, in
alternating order, so that whatever else the machine does meets them alike; and all have the first one's dtype.
"""

from __future__ import annotations

import logging
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from matvlm import kernels
from matvlm.artifacts import Checkpoint, ProfilePoint, ProfileResult
from matvlm.config import Profile
from matvlm.costs import cache_bytes
from matvlm.models import locate
from matvlm.progress import Progress
from matvlm.reporting import Reporter

log = logging.getLogger(__name__)

SEED = 0


class Comparison(NamedTuple):
    """One model against the baseline at one context, as ratios: above 1 is more of it."""

    label: str
    context: int
    prefill_speed: float
    decode_speed: float
    cache_bytes: float
    peak_bytes: float | None


class _Sample(NamedTuple):
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    peak_bytes: int | None


class _Subject:
    """A model under measurement: its decoder with the output head, without the vision tower's forward pass."""

    def __init__(self, label: str, model: Any):
        self.label = label
        self.model = model
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.config = model.config.get_text_config(decoder=True)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def next_token(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Feed ``ids`` int64 [B, L]; the most likely next token, int64 [B, 1]."""
        hidden = self.decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return self.head(hidden[:, -1:]).argmax(-1)


def profile(
    checkpoints: list[Checkpoint], settings: Profile, reporter: Reporter, device: torch.device | str = "cpu"
) -> ProfileResult:
    """Measure every checkpoint at every context; one unrecorded warm-up each, then medians over ``settings.repeats``.

    Peak memory (GPU only) is that of a model alone: its weights and whatever its own run allocates on top.

    Raises:
        ValueError: labels repeat, or a context is longer than the learnt positions of a model.
    """
    labels = [checkpoint.label for checkpoint in checkpoints]
    if len(set(labels)) < len(labels):
        raise ValueError(f"profile: every checkpoint needs a label of its own, got {labels}")
    device = torch.device(device)
    subjects = _open(checkpoints, device)
    _check_positions(subjects, max(settings.contexts) + settings.new_tokens)
    samples: dict[tuple[str, int], list[_Sample]] = {}
    total = len(subjects) * len(settings.contexts) * (settings.repeats + 1)
    with Progress(total, "profile", "measurement", reporter) as progress:
        for subject, context, repeat in _turns(subjects, settings):
            ids = _random_ids(subject, settings.batch_size, context, device)
            sample = _measure(subject, ids, settings.new_tokens)
            if repeat > 0:
                samples.setdefault((subject.label, context), []).append(sample)
            progress.update(1)
    points = [_median_point(*key, taken, settings) for key, taken in samples.items()]
    points.sort(key=lambda point: (labels.index(point.label), point.context))
    _report(points, reporter)
    return ProfileResult(
        points=points,
        machine={**machine_facts(device), "dtype": str(subjects[0].model.dtype).removeprefix("torch.")},
        repeats=settings.repeats,
        new_tokens=settings.new_tokens,
    )


def compare(result: ProfileResult, baseline: str = "teacher") -> list[Comparison]:
    """Every other model against ``baseline``, per context; speeds as the median of the ratios repeat by repeat.

    Raises:
        ValueError: the result has no model labelled ``baseline``.
    """
    base = {point.context: point for point in result.points if point.label == baseline}
    if not base:
        found = sorted({point.label for point in result.points})
        raise ValueError(f"compare: no model labelled {baseline!r} in the profile; it has {found}")
    return [
        Comparison(
            label=point.label,
            context=point.context,
            prefill_speed=_median_ratio(base[point.context].prefill_seconds_each, point.prefill_seconds_each),
            decode_speed=_median_ratio(
                point.decode_tokens_per_second_each, base[point.context].decode_tokens_per_second_each
            ),
            cache_bytes=point.cache_bytes / base[point.context].cache_bytes,
            peak_bytes=_ratio(point.peak_bytes, base[point.context].peak_bytes),
        )
        for point in result.points
        if point.label != baseline
    ]


def machine_facts(device: torch.device) -> dict[str, str]:
    """What the figures were measured on and with."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernels": kernels.resolve_backend("auto", device),
        "input": f"random token ids (seed {SEED}), greedy decoding, dynamic cache",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _turns(subjects: list[_Subject], settings: Profile) -> Iterator[tuple[_Subject, int, int]]:
    """(model, context, repeat) in the order of measurement; repeat 0 is the warm-up."""
    for context in settings.contexts:
        for repeat in range(settings.repeats + 1):
            for subject in subjects if repeat % 2 else reversed(subjects):
                yield subject, context, repeat


@torch.inference_mode()
def _measure(subject: _Subject, ids: Tensor, new_tokens: int) -> _Sample:
    on_gpu = ids.device.type == "cuda"
    resident = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ids.device)
        resident = torch.cuda.memory_allocated(ids.device)
    cache = DynamicCache(config=subject.config)
    started = _now(ids.device)
    token = subject.next_token(ids, cache)
    prefilled = _now(ids.device)
    size = cache_bytes(cache)
    decoding = _now(ids.device)
    for _ in range(new_tokens):
        token = subject.next_token(token, cache)
    done = _now(ids.device)
    peak = torch.cuda.max_memory_allocated(ids.device) - resident + subject.weight_bytes if on_gpu else None
    return _Sample(prefilled - started, done - decoding, size, peak)


def _now(device: torch.device) -> float:
    """Seconds, after everything queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _random_ids(subject: _Subject, batch_size: int, context: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(subject.config.vocab_size, (batch_size, context), generator=generator).to(device)


def _open(checkpoints: list[Checkpoint], device: torch.device) -> list[_Subject]:
    subjects: list[_Subject] = []
    for checkpoint in checkpoints:
        dtype = subjects[0].model.dtype if subjects else None
        subjects.append(_Subject(checkpoint.label, locate.load(checkpoint.uri, device, dtype)[0]))
    return subjects


def _check_positions(subjects: list[_Subject], needed: int) -> None:
    """Warn of models that were made for fewer than ``needed`` positions; refuse those that cannot be run there."""
    short = []
    for subject in subjects:
        positions = getattr(subject.config, "max_position_embeddings", None)
        if positions is None or needed <= positions:
            continue
        if not getattr(subject.config, "rope_parameters", None):
            raise ValueError(
                f"profile.contexts: the longest context and profile.new_tokens need {needed} positions, but "
                f"{subject.label} has learnt {positions} (max_position_embeddings); shorten profile.contexts"
            )
        short.append(f"{subject.label} ({positions})")
    if short:
        log.warning(
            "The profile goes up to %d positions, beyond those of %s. Rotary positions are computed, so speed and "
            "memory are as measured, but answers at such lengths would mean nothing.",
            needed,
            ", ".join(short),
        )


def _median_point(label: str, context: int, samples: list[_Sample], settings: Profile) -> ProfilePoint:
    prefills = [sample.prefill_seconds for sample in samples]
    speeds = [settings.new_tokens * settings.batch_size / sample.decode_seconds for sample in samples]
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return ProfilePoint(
        label=label,
        context=context,
        batch_size=settings.batch_size,
        prefill_seconds=statistics.median(prefills),
        decode_tokens_per_second=statistics.median(speeds),
        cache_bytes=samples[0].cache_bytes,
        peak_bytes=max(peaks) if peaks else None,
        prefill_seconds_each=prefills,
        decode_tokens_per_second_each=speeds,
    )


def _report(points: list[ProfilePoint], reporter: Reporter) -> None:
    """One metric series per model and quantity, over the context length as step."""
    for point in points:
        values = point.model_dump(include={"prefill_seconds", "decode_tokens_per_second", "cache_bytes", "peak_bytes"})
        known = {f"profile/{point.label}/{name}": value for name, value in values.items() if value is not None}
        reporter.metrics(known, step=point.context)


def _median_ratio(values: list[float], bases: list[float]) -> float:
    return statistics.median(value / base for value, base in zip(values, bases, strict=True))


def _ratio(value: int | None, base: int | None) -> float | None:
    return value / base if value and base else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
