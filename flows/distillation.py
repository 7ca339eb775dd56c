"""The distillation of one student: a task of the training flow on one node, or one of the tasks that are its nodes."""

from __future__ import annotations

import zlib
from typing import Any

import cards
import evaluation
import run_files
import support

from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.processes import Nodes
from matvlm.reporting import Reporter
from matvlm.storage import join

PORTS = range(20000, 30000)
"""Where nodes meet: below those that systems give away, above those of services."""


def distill(flow: Any, recipe: Recipe, nodes: Nodes) -> dict[str, Any] | None:
    """Train ``flow.student``; the trained one as JSON, None on all nodes but the first, which reports for all."""
    from matvlm.distill.job import DistillJob
    from matvlm.distill.launch import run

    student = Checkpoint.model_validate(flow.student)
    name = f"distill[{student.init}]"
    job = DistillJob(
        recipe=here(flow, recipe, "distill"),
        student=student,
        teacher=Checkpoint.model_validate(flow.teacher),
        data=DataManifest.model_validate(flow.data),
        targets=TargetStore.model_validate(flow.targets),
        folder=run_files.path(flow, "distill", str(student.init)),
    )
    if nodes.index > 0:
        with support.clear_errors(name):
            run(job, Reporter(), support.device(), nodes)
        return None
    progress = cards.DistillCard(f"Distilling {recipe.name}, initialisation {student.init}")
    registrar = evaluation.Registrar(flow, recipe, str(student.init))
    with support.stage(flow, recipe, name, progress, registrar) as reporter:
        trained = run(job, reporter, support.device(), nodes)
    assert trained is not None
    return run_files.keep(flow, trained)


def port(run_id: str, student: dict[str, Any]) -> int:
    """The same on all nodes of a distillation, and hardly that of another one, which may be on the same machine."""
    return PORTS[zlib.crc32(f"{run_id} {student['init']}".encode()) % len(PORTS)]


def here(flow: Any, recipe: Recipe, step: str) -> Recipe:
    """With the resources of ``step``; snapshots of a run on S3 are there too, unless the recipe says where."""
    distill = recipe.distill
    if flow.folder.startswith("s3://") and distill.snapshots is None:
        distill = distill.model_copy(update={"snapshots": join(run_files.runs_uri(), "snapshots")})
    return recipe.model_copy(update={"resources": recipe.resources.of(step), "distill": distill})
