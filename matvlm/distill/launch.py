"""A distillation in several processes of this machine: started, listened to, and ended together.

Whoever wants another try continues the run, from its last snapshot.
"""

from __future__ import annotations

from matvlm import processes
from matvlm.artifacts import Checkpoint
from matvlm.distill.failures import DistillError
from matvlm.distill.job import EVENTS, JOB, DistillJob, Tail
from matvlm.distill.trainer import RESULT
from matvlm.reporting import Reporter
from matvlm.storage import write_json


def run(job: DistillJob, reporter: Reporter, device: str) -> Checkpoint:
    """``job`` in as many processes as its recipe asks for; ``reporter`` hears the first one while it works.

    Raises:
        DistillError: a process failed or was killed; the message says which one, how, and its own error.
        ValueError: the recipe asks for more processes than there are GPUs; and the other errors of ``distill``, if one
            process is enough.
    """
    count = processes.num_processes(job.recipe.resources, device)
    if count > 1 and not (job.folder / RESULT).exists():
        _in_processes(job, count, reporter)
    return job.run(reporter, device)


def _in_processes(job: DistillJob, count: int, reporter: Reporter) -> None:
    write_json(job.folder / JOB, job.model_dump(mode="json"))
    (job.folder / EVENTS).unlink(missing_ok=True)
    events = Tail(job.folder / EVENTS, reporter)
    try:
        processes.run(["distill", str(job.folder / JOB)], count, events.catch_up)
    except processes.ProcessError as error:
        raise DistillError(f"{error}; resuming continues from the last snapshot") from error
