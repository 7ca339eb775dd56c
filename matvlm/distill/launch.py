"""A distillation in several processes of one or more machines: started, listened to, and ended together.

Whoever wants another try continues the run, from its last snapshot.
"""

from __future__ import annotations

from matvlm import processes
from matvlm.artifacts import Checkpoint
from matvlm.distill.failures import DistillError
from matvlm.distill.job import EVENTS, JOB, DistillJob, Tail
from matvlm.distill.trainer import RESULT
from matvlm.processes import ONE_NODE, Nodes
from matvlm.reporting import Reporter
from matvlm.storage import write_json


def run(job: DistillJob, reporter: Reporter, device: str, nodes: Nodes = ONE_NODE) -> Checkpoint | None:
    """``job`` in as many processes on each node as its recipe asks for; ``reporter`` hears the first while it works.

    Nodes need no folder in common: each has a job of its own, whose files may be elsewhere but are the same. Node 0
    alone reports, keeps snapshots and saves the student; the others return None when it has.

    Raises:
        DistillError: a process failed or was killed; the message says which one, how, and its own error. Or the nodes
            do not find each other, or differ in their processes or inputs.
        ValueError: the recipe asks for more processes than there are GPUs; and the other errors of ``distill``, if one
            process is enough.
    """
    count = processes.num_processes(job.recipe.resources, device)
    if nodes.count > 1 or (count > 1 and not (job.folder / RESULT).exists()):
        _in_processes(job, count, reporter, nodes)
    return job.run(reporter, device) if nodes.index == 0 else None


def _in_processes(job: DistillJob, count: int, reporter: Reporter, nodes: Nodes) -> None:
    write_json(job.folder / JOB, job.model_dump(mode="json"))
    events = Tail(job.folder / EVENTS, reporter)
    if nodes.index == 0:
        events.path.unlink(missing_ok=True)
    look = events.catch_up if nodes.index == 0 else lambda: None
    try:
        processes.run(["distill", str(job.folder / JOB)], count, look, nodes)
    except processes.ProcessError as error:
        raise DistillError(f"{error}; resuming continues from the last snapshot") from error
