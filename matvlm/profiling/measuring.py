"""The order of measurement, memory, and what happens where it is not enough."""

from __future__ import annotations

import gc
import itertools
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.artifacts import Measurement, Memory, ProfilePoint, Repeats
from matvlm.config import Profile, StackName
from matvlm.costs import DecodeCost, decode_cost
from matvlm.profiling.stacks import Stack, Timing, make, now
from matvlm.progress import Progress
from matvlm.reporting import Reporter

log = logging.getLogger(__name__)

SEED = 0
WARM_UP = 8
"""Tokens of the unrecorded call, in a cache of full length."""
QUANTITIES = ("prefill_seconds", "first_token_seconds", "decode_tokens_per_second", "total_seconds")


class ProfileError(ValueError):
    """What cannot be measured as it was asked for."""


class _Place(NamedTuple):
    prompt: int
    new_tokens: int
    batch_size: int


class _Usage(NamedTuple):
    """Bytes of the device's memory."""

    allocated: int
    reserved: int


Subject = TypeVar("Subject")


@dataclass(eq=False)
class _Subject:
    """A model on a stack."""

    label: str
    name: StackName
    model: PreTrainedModel
    stack: Stack
    cost: DecodeCost
    weights: int


@dataclass
class _Taken:
    """Of one subject at one place."""

    timings: list[Timing] = field(default_factory=list)
    peaks: list[_Usage] = field(default_factory=list)
    kept: _Usage = field(default_factory=lambda: _Usage(0, 0))
    """What the stack holds between runs, beside the weights."""
    first_call_seconds: float = 0.0
    out_of_memory: bool = False


def measure(
    models: Sequence[tuple[str, PreTrainedModel]], settings: Profile, bandwidth: float, reporter: Reporter
) -> list[ProfilePoint]:
    """All points, sorted by model, stack, prompt, answer and batch size; the reporter gets them as they come."""
    subjects = _subjects(models, settings)
    places = [_Place(*each) for each in itertools.product(settings.prompts, settings.new_tokens, settings.batch_sizes)]
    found: dict[tuple[str, str, _Place], ProfilePoint] = {}
    total = len(subjects) * len(places) * (settings.repeats + 1)
    with Progress(total, "profile", "measurement", reporter) as progress:
        for group in _groups(subjects, places):
            for (subject, place), taken in _measure_group(subjects, group, settings.repeats, progress).items():
                measured = None if taken.out_of_memory else _measurement(subject, place, taken)
                point = _point(subject, place, bandwidth, measured)
                found[subject.label, subject.name, place] = point
                _report(point, reporter)
    return [found[subject.label, subject.name, place] for subject in subjects for place in places]


def check_positions(models: Sequence[tuple[str, PreTrainedModel]], settings: Profile) -> None:
    """Warn of models that were made for fewer positions than are needed; refuse those that cannot be run there.

    Raises:
        ProfileError: a model has learnt fewer positions.
    """
    needed, short = settings.lengths[-1], []
    for label, model in models:
        config: Any = model.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or needed <= positions:
            continue
        if not getattr(config, "rope_parameters", None):
            raise ProfileError(
                f"profile.prompts, profile.new_tokens: the longest need {needed} positions together, but {label} has "
                f"learnt {positions} (max_position_embeddings); shorten them"
            )
        short.append(f"{label} ({positions})")
    if short:
        log.warning(
            "The profile goes up to %d positions, beyond those of %s. Rotary positions are computed, so speed and "
            "memory are as measured, but answers at such lengths would mean nothing.",
            needed,
            ", ".join(short),
        )


def _subjects(models: Sequence[tuple[str, PreTrainedModel]], settings: Profile) -> list[_Subject]:
    on_gpu = models[0][1].device.type == "cuda"
    usual: list[StackName] = ["engine", "hf", "hf_static"] if on_gpu else ["engine", "hf"]
    subjects = []
    for label, model in models:
        cost, weights = decode_cost(model), sum(p.numel() * p.element_size() for p in model.parameters())
        subjects += [
            _Subject(label, name, model, make(name, model), cost, weights) for name in settings.stacks or usual
        ]
    return subjects


def _groups(subjects: list[_Subject], places: list[_Place]) -> list[list[_Place]]:
    """Places whose repeats are taken in common rounds, and so spread over more time; compiled code is for one place."""
    compiled = any(subject.name == "hf_static" and subject.model.device.type == "cuda" for subject in subjects)
    return [[place] for place in places] if compiled else [places]


def _measure_group(
    subjects: list[_Subject], places: list[_Place], repeats: int, progress: Progress
) -> dict[tuple[_Subject, _Place], _Taken]:
    taken = {(subject, place): _Taken() for place in places for subject in subjects}
    for repeat, place, subject in _turns(subjects, places, repeats):
        found = taken[subject, place]
        if not found.out_of_memory and not _try(subject, place, found, repeat):
            where = f"prompt {place.prompt:,}, {place.new_tokens:,} new tokens, batch {place.batch_size:,}"
            log.warning("%s on %s: out of memory (%s); the others go on", subject.label, subject.name, where)
            found.out_of_memory = True
        progress.update(1)
    for subject in subjects:
        subject.stack.forget()
    if subjects[0].model.device.type == "cuda":
        torch.compiler.reset()
    return taken


def _turns(subjects: list[Subject], places: list[_Place], repeats: int) -> Iterator[tuple[int, _Place, Subject]]:
    """(repeat, place, subject) in the order of measurement; repeat 0 is the warm-up."""
    for repeat, place in itertools.product(range(repeats + 1), places):
        for subject in subjects if repeat % 2 else reversed(subjects):
            yield repeat, place, subject


def _try(subject: _Subject, place: _Place, taken: _Taken, repeat: int) -> bool:
    """One run of ``subject``; False if the memory was not enough."""
    try:
        _run(subject, place, taken, repeat)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return False
    return True


def _run(subject: _Subject, place: _Place, taken: _Taken, repeat: int) -> None:
    """What PyTorch reserved is seen from the first repeat alone: to take memory anew each time would take time."""
    device = subject.model.device
    ids = _random_ids(subject.model, place)
    before = _in_use(device, give_back=repeat <= 1)
    started = now(device)
    timing = subject.stack.run(ids, place.new_tokens, _end(place, repeat))
    if repeat == 0:
        taken.first_call_seconds = now(device) - started
        after = _in_use(device, give_back=True)
        # Less than nothing: what others had left behind was freed meanwhile.
        taken.kept = _Usage(*(max(0, now_held - held) for now_held, held in zip(after, before, strict=True)))
        return
    taken.timings.append(timing)
    if device.type == "cuda":
        peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        own = (peak - base + kept for peak, base, kept in zip(peaks, before, taken.kept, strict=True))
        taken.peaks.append(_Usage(*(size + subject.weights for size in own)))


def _end(place: _Place, repeat: int) -> int:
    return place.new_tokens if repeat else min(WARM_UP, place.new_tokens)


def _in_use(device: torch.device, give_back: bool) -> _Usage:
    """Now, if asked for after unused memory is given back to the device; peaks are counted from here on."""
    if device.type != "cuda":
        return _Usage(0, 0)
    gc.collect()
    torch.cuda.synchronize(device)
    if give_back:
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return _Usage(torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where another error came of it (a graph was not recorded), and on a CPU, which has no class of its own."""
    if error is None:
        return False
    told = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
    return told or isinstance(error, torch.OutOfMemoryError) or _is_out_of_memory(error.__context__)


def _random_ids(model: PreTrainedModel, place: _Place) -> Tensor:
    """int64 [B, L]; no id that stands for an image or ends an answer."""
    special = {
        number
        for name, value in _flat(model.config.to_dict())
        if name.endswith(("token_id", "token_index")) and value is not None
        for number in (value if isinstance(value, list) else [value])
    }
    size = model.config.get_text_config(decoder=True).vocab_size
    words = torch.tensor([number for number in range(size) if number not in special])
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randint(len(words), (place.batch_size, place.prompt), generator=generator)
    return words[chosen].to(model.device)


def _flat(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield str(name), value


def _measurement(subject: _Subject, place: _Place, taken: _Taken) -> Measurement:
    decoded, timings = place.new_tokens - 1, taken.timings
    surplus = 1 - (_end(place, repeat=0) - 1) / decoded
    allocated = max((peak.allocated for peak in taken.peaks), default=None)
    like_the_first = statistics.median(timing.timed_seconds - surplus * timing.decode_seconds for timing in timings)
    return Measurement(
        prefill_seconds=Repeats(each=[timing.prefill_seconds for timing in timings]),
        first_token_seconds=Repeats(each=[timing.first_token_seconds for timing in timings]),
        decode_tokens_per_second=Repeats(
            each=[place.batch_size * decoded / timing.decode_seconds for timing in timings]
        ),
        total_seconds=Repeats(each=[timing.first_token_seconds + timing.decode_seconds for timing in timings]),
        setup_seconds=max(0.0, taken.first_call_seconds - like_the_first),
        memory=Memory(
            weights=subject.weights,
            kv=timings[-1].kv_bytes,
            state=timings[-1].state_bytes,
            peak_allocated=allocated,
            # At least as much: some of it had room in what was reserved before.
            peak_reserved=None if allocated is None else max(taken.peaks[0].reserved, allocated),
        ),
    )


def _point(subject: _Subject, place: _Place, bandwidth: float, measured: Measurement | None) -> ProfilePoint:
    step_bytes = subject.cost.step(place.prompt + place.new_tokens // 2, place.batch_size)
    return ProfilePoint(
        label=subject.label,
        stack=subject.name,
        **place._asdict(),
        step_bytes=step_bytes,
        floor_tokens_per_second=place.batch_size * bandwidth / step_bytes,
        measured=measured,
    )


def _report(point: ProfilePoint, reporter: Reporter) -> None:
    """One metric series per model, stack and batch size, over the tokens of a sequence at the end as step."""
    if point.measured is None:
        return
    batch = "" if point.batch_size == 1 else f"/batch_{point.batch_size}"
    memory = point.measured.memory
    values = {name: getattr(point.measured, name).median for name in QUANTITIES}
    values |= {"cache_bytes": memory.cache, "peak_bytes": memory.peak_allocated, "share_of_floor": point.share_of_floor}
    known = {f"profile/{point.label}/{point.stack}{batch}/{name}": value for name, value in values.items() if value}
    reporter.metrics(known, step=point.prompt + point.new_tokens)
