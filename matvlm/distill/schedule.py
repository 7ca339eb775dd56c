"""What an update is a function of: how many there are, the samples, the loss and the learning rate of each.

Nothing is drawn. A run has one stage or two: ``recipe.distill.align.updates`` of alignment, and the end-to-end stage.
Updates are counted from 1 through both; weights and learning rate of a stage from the stage's own first update.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np

from matvlm.config import Distill, Loss, Schedule

ALIGNMENT = {"prob": 0.0, "layer": 1.0, "ce": 0.0, "ce_teacher": 0.0, "logits_l2": 0.0}
STAGE_NUMBERS = {"align": 1.0, "distill": 2.0}
"""As a metric, which has to be a number."""


class Moment(NamedTuple):
    """What holds in one update."""

    stage: Literal["align", "distill"]
    loss: Loss
    lr: float
    logged: dict[str, float]
    """The number of the stage where there are two, and the weights that change in it."""


def moment(settings: Distill, update: int, total: int) -> Moment:
    """What holds in ``update`` (from 1) of the ``total`` of both stages."""
    before = settings.align.updates
    if update <= before:
        loss = settings.loss.at(1).model_copy(update={**ALIGNMENT, "layer_inputs": "teacher_forced"})
        lr = learning_rate(settings.align.lr, settings.align.schedule, update, before)
        return Moment("align", loss, lr, {"stage": STAGE_NUMBERS["align"]})
    loss = settings.loss.at(update - before)
    lr = learning_rate(settings.optimizer.lr, settings.schedule, update - before, total - before)
    weights = {f"weight_{name}": ramp.at(update - before) for name, ramp in settings.loss.ramps.items()}
    return Moment("distill", loss, lr, ({"stage": STAGE_NUMBERS["distill"]} if before else {}) | weights)


def num_updates(settings: Distill, num_samples: int) -> int:
    """Optimiser updates of both stages; the last batch of an epoch may be smaller."""
    updates = settings.epochs * math.ceil(num_samples / settings.batch_size)
    return settings.align.updates + min(updates, settings.max_updates or updates)


def order(num_samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """The data set rows of ``update`` (from 1, through both stages): a permutation per epoch, made of (seed, epoch)."""
    per_epoch = math.ceil(num_samples / batch_size)
    epoch, position = divmod(update - 1, per_epoch)
    permutation = np.random.default_rng((seed, epoch)).permutation(num_samples)
    rows: list[int] = permutation[position * batch_size : (position + 1) * batch_size].tolist()
    return rows


def learning_rate(peak: float, schedule: Schedule, update: int, total: int) -> float:
    """The rate of ``update`` (from 1) of ``total``; the last is ``final_lr_share`` of ``peak`` if it decays.

    ``wsd`` takes the lower one of its slopes where they overlap; ``cosine`` (arXiv 1608.03983, without restarts) only
    rises if the run is no longer than its warm-up.
    """
    up = min(1.0, update / schedule.warmup_updates) if schedule.warmup_updates else 1.0
    left = 1.0
    if schedule.shape == "cosine" and update > schedule.warmup_updates:
        done = (update - schedule.warmup_updates) / (total - schedule.warmup_updates)
        left = (1.0 + math.cos(math.pi * done)) / 2
    elif schedule.decay_updates:
        left = min(1.0, (total - update) / schedule.decay_updates)
    down = schedule.final_lr_share + (1.0 - schedule.final_lr_share) * left
    return peak * min(up, down)
