"""Experiment tracking: MLflow behind a local journal, so that nothing is lost and no run is stopped by it."""

from matvlm.tracking.address import tracking_uri
from matvlm.tracking.delivery import sync
from matvlm.tracking.environment import environment, flatten
from matvlm.tracking.journal import FOLDER as TRACKING
from matvlm.tracking.registry import name_checkpoints, resolve_checkpoint
from matvlm.tracking.store import TrackingError
from matvlm.tracking.tracker import Status, StepRun, Tracker

__all__ = [
    "TRACKING",
    "Status",
    "StepRun",
    "Tracker",
    "TrackingError",
    "environment",
    "flatten",
    "name_checkpoints",
    "resolve_checkpoint",
    "sync",
    "tracking_uri",
]
