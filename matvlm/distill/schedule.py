"""What an update is a function of: how many there are, the samples of each and its learning rate. Nothing is drawn."""

from __future__ import annotations

import math

import numpy as np

from matvlm.config import Distill, Schedule


def num_updates(settings: Distill, num_samples: int) -> int:
    """Optimiser updates of the whole run; the last batch of an epoch may be smaller."""
    updates = settings.epochs * math.ceil(num_samples / settings.batch_size)
    return min(updates, settings.max_updates or updates)


def order(num_samples: int, batch_size: int, seed: int, update: int) -> list[int]:
    """The data set rows of ``update`` (from 1): a permutation per epoch, a function of (seed, epoch) alone."""
    per_epoch = math.ceil(num_samples / batch_size)
    epoch, position = divmod(update - 1, per_epoch)
    permutation = np.random.default_rng((seed, epoch)).permutation(num_samples)
    rows: list[int] = permutation[position * batch_size : (position + 1) * batch_size].tolist()
    return rows


def learning_rate(peak: float, schedule: Schedule, update: int, total: int) -> float:
    """Warmup-stable-decay at ``update`` (from 1): linear up, constant, linear down to that share of ``peak``."""
    up = min(1.0, update / schedule.warmup_updates) if schedule.warmup_updates else 1.0
    left = (total - update) / schedule.decay_updates if schedule.decay_updates else 1.0
    down = schedule.final_lr_share + (1.0 - schedule.final_lr_share) * min(1.0, left)
    return peak * min(up, down)
