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
