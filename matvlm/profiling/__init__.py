"""``profile``: speed and memory of several models on several stacks, side by side in one process.

A subject is a model on a stack: ``engine`` (ours), ``hf`` (transformers' ``generate()`` with its dynamic cache) or
``hf_static`` (``generate()`` with its static cache, which it compiles itself on a GPU). What is the same for all:

- The prompt: random token ids, the same for every model of one vocabulary, with no padding. Speed and memory do not
  depend on what a text says. An image is so many more tokens; its tower, which teacher and hybrid share, is left out.
- The answer: greedy, of exactly ``new_tokens``; end tokens mean nothing, and cost no work.
- The order: in every repeat subjects take turns at each point (prompt, new tokens, batch size), in alternating order,
  so that whatever else the machine does meets them alike, and the repeats of a point are spread over the whole time
  (but over that of the point alone where something is compiled for it). All have the first model's dtype.
- The memory: a subject gives back what it needed before the next one begins. An out-of-memory error makes a row of its
  own, and the next points are tried all the same. The weights of all models stay on the device meanwhile.

What is measured, as median with the lowest and highest of the repeats, one unrecorded short call before:

- ``prefill_seconds``. transformers: one forward pass of the decoder over the prompt into a new cache, with the last
  position's logits. Engine: all but the last token, which belongs to its first step. The first token is what compares.
- ``first_token_seconds``: from the call until the first token is there. transformers: a real ``generate()``, whose own
  preparations count. Engine: a session opened before, as a server has it, so opening counts as set-up.
- ``decode_tokens_per_second``: of the whole batch, from the first token to the last, of that same call. The engine
  never waits for a token on its way to the host, neither here nor in ``Engine.generate``; ``generate()`` does.
- ``setup_seconds``: what the first call took beyond a later one. It is where compiling and recording graphs are seen;
  what ``generate()`` records anew in every call, as its static cache is a new one, stays in that call's time.
- Memory: see ``matvlm.artifacts.Memory``.

The floor is what the bytes of a decode step (``matvlm.costs``), at the middle of the answer, take at the bandwidth that
a copy on the device reached in this process. Where caches of a CPU hold the weights, a share can be above 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from matvlm.artifacts import Checkpoint, ProfileResult
from matvlm.config import Profile
from matvlm.models import locate
from matvlm.profiling.gains import Comparison, StackGain, compare, stack_gains
from matvlm.profiling.machine import copy_bandwidth, machine_facts
from matvlm.profiling.measuring import ProfileError, check_positions, measure
from matvlm.reporting import Reporter

__all__ = [
    "Comparison",
    "ProfileError",
    "StackGain",
    "compare",
    "copy_bandwidth",
    "machine_facts",
    "profile",
    "profile_models",
    "stack_gains",
]


def profile(
    checkpoints: list[Checkpoint], settings: Profile, reporter: Reporter, device: torch.device | str = "cpu"
) -> ProfileResult:
    """Open every checkpoint and measure it; see ``profile_models``.

    Raises:
        ProfileError: as ``profile_models`` does.
        ModelFolderError, StorageError: as ``locate.load`` does.
    """
    _check_labels([checkpoint.label for checkpoint in checkpoints])
    models: list[tuple[str, PreTrainedModel]] = []
    for checkpoint in checkpoints:
        dtype = models[0][1].dtype if models else None
        models.append((checkpoint.label, locate.load(checkpoint.uri, device, dtype)[0]))
    return profile_models(models, settings, reporter)


def profile_models(
    models: Sequence[tuple[str, PreTrainedModel]], settings: Profile, reporter: Reporter
) -> ProfileResult:
    """Measure every model on every stack at every point of ``settings``.

    Args:
        models: (label, model), all on one device and in one dtype; the first is what the others are held against.
        settings: ``stacks`` null stands for engine and hf, and on a GPU for hf_static too.

    Raises:
        ProfileError: labels repeat, models differ in device or dtype, or a point is longer than the learnt positions of
            a model.
    """
    _check_labels([label for label, _ in models])
    places = {(str(model.device), str(model.dtype)) for _, model in models}
    if len(places) != 1:
        raise ProfileError(f"profile: models must be on one device and in one dtype, got {sorted(places)}")
    check_positions(models, settings)
    device = models[0][1].device
    bandwidth = copy_bandwidth(device)
    points = measure(models, settings, bandwidth, reporter)
    facts = {**machine_facts(device), "dtype": str(models[0][1].dtype).removeprefix("torch.")}
    facts["copy"] = f"{bandwidth / 1e9:,.1f} GB/s, bytes read and written"
    return ProfileResult(points=points, machine=facts, repeats=settings.repeats, bandwidth=bandwidth)


def _check_labels(labels: list[str]) -> None:
    if len(set(labels)) < len(labels):
        raise ProfileError(f"profile: every checkpoint needs a label of its own, got {labels}")
