"""A study over recipe fields: what its points are, running one of them, and their results side by side.

Light to import; ``matvlm.sweep.running`` and ``matvlm.sweep.summary`` are for those who need them.
"""

from matvlm.sweep.results import PointResult, Summary, SweepError, refuse_none, students_to_profile
from matvlm.sweep.settings import TEACHER, Sweep, Trial

__all__ = [
    "TEACHER",
    "PointResult",
    "Summary",
    "Sweep",
    "SweepError",
    "Trial",
    "refuse_none",
    "students_to_profile",
]
