"""Distillation: a hybrid student learns from the model it was made of, through sparse targets and layer outputs."""

from matvlm.distill.trainer import DistillError, distill, init_student

__all__ = ["DistillError", "distill", "init_student"]
