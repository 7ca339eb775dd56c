"""What the flows share: reading the recipe, the run's folder, the MLflow side of a step, and how a run is continued.

``main(Flow)`` is what each flow file ends with. It adds ``--set field.path=value`` to Metaflow's ``run``, refuses a bad
recipe before anything starts, and ends a failed run by printing the command that continues it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "matvlm").is_dir():
    sys.path.insert(0, str(ROOT))

from metaflow import FlowSpec, Run, current  # noqa: E402

from matvlm.config import RecipeError, Section, parse_recipe  # noqa: E402
from matvlm.reporting import Reporter, Reporters  # noqa: E402
from matvlm.tracking import Tracker, environment, flatten  # noqa: E402

RECIPES = ROOT / "flows" / "recipes"
Kind = TypeVar("Kind", bound=Section)


def runs_folder() -> Path:
    """Where runs keep their files: ``MATVLM_RUNS``, or ``runs`` in the current folder."""
    return Path(os.environ.get("MATVLM_RUNS", "runs")).resolve()


def open_run(recipe: Any, **tags: str) -> tuple[str, str]:
    """Name a new run, make its folder, open its MLflow run. The names are artifacts, so a resumed run keeps them.

    Returns:
        The run's key, under which MLflow finds its runs again, and the folder of its files.
    """
    run_key = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = runs_folder() / run_key
    folder.mkdir(parents=True)
    tracker = Tracker(run_key, folder, recipe.tracking.experiment)
    tags |= {"flow": current.flow_name, "metaflow_run": current.run_id, "recipe": recipe.name}
    tracker.parent({**flatten(recipe.model_dump(mode="json")), **environment()}, tags)
    print(f"Files of this run: {folder}\nIf it is interrupted: {resume_command(current.run_id)}")
    return run_key, str(folder)


def tracker_of(flow: Any, recipe: Any) -> Tracker:
    return Tracker(flow.run_key, Path(flow.folder), recipe.tracking.experiment)


@contextmanager
def stage(flow: Any, recipe: Any, name: str, *listeners: Reporter) -> Iterator[Reporter]:
    """The MLflow run of one step, and what else listens to it; sets the recipe's number of torch threads."""
    import torch

    torch.set_num_threads(recipe.resources.cpu)
    with tracker_of(flow, recipe).step(name) as run:
        yield Reporters(run, *listeners)


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_teacher(recipe: Any, device: str = "cpu") -> tuple[Any, Any]:
    """Model and processor of ``recipe.teacher``."""
    import torch

    from matvlm.models import locate

    teacher = recipe.teacher
    return locate.load(teacher.model, device, getattr(torch, teacher.dtype), teacher.revision)


def file_name(label: str) -> str:
    """``label`` as a folder name: "student, untrained" -> "student-untrained"."""
    return "-".join(re.findall(r"\w+", label))


def script() -> str:
    """The flow's file as one would type it from the project's root."""
    return f"flows/{Path(sys.argv[0]).name}"


def resume_command(run_id: str) -> str:
    return f"python {script()} resume --origin-run-id {run_id}"


def parse(text: str, kind: type[Kind]) -> dict[str, Any]:
    """A recipe's text as the JSON-able dict that Metaflow stores with the run."""
    return parse_recipe(text, source=_recipe_source(), kind=kind).model_dump(mode="json")


def main(flow: type[FlowSpec], kind: type[Section]) -> None:
    """Run ``flow`` from the command line."""
    command = next((word for word in sys.argv[1:] if word in ("run", "resume")), None)
    if command is None:
        flow()
        return
    try:
        sys.argv[1:] = _with_overrides(sys.argv[1:], flow, kind)
    except RecipeError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        run_id_file = Path(scratch) / "run_id"
        if "--run-id-file" not in sys.argv:
            sys.argv += ["--run-id-file", str(run_id_file)]
        try:
            flow()
        except SystemExit as stop:
            if stop.code and run_id_file.exists():
                _after_failure(flow.__name__, run_id_file.read_text().strip())
            raise


def _after_failure(flow_name: str, run_id: str) -> None:
    """Close the MLflow run as failed and say how to go on."""
    try:
        started = Run(f"{flow_name}/{run_id}", _namespace_check=False)["start"].task.data
        recipe = started.recipe
        Tracker(started.run_key, Path(started.folder), recipe["tracking"]["experiment"]).finish("FAILED")
    except Exception as error:  # the run may have failed before its start was recorded
        print(f"The MLflow run could not be closed: {error}", file=sys.stderr)
    print(f"\nThe run stopped. Continue it with:\n    {resume_command(run_id)}", file=sys.stderr)


def _with_overrides(words: list[str], flow: type[FlowSpec], kind: type[Section]) -> list[str]:
    """Replace ``--set a=b`` (several, or separated by spaces) and the recipe it changes by the resolved recipe."""
    overrides: list[str] = []
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--set":
            overrides += next(rest, "").split()
        elif word.startswith("--set="):
            overrides += word.removeprefix("--set=").split()
        else:
            kept.append(word)
    if "resume" in kept:
        if overrides:
            raise RecipeError("--set: a resumed run keeps its recipe; start a new run to change it")
        return kept
    source, kept = _take_recipe(kept, flow)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: cannot read the recipe: {error.strerror}") from None
    recipe = parse_recipe(text, source=source, overrides=overrides, kind=kind)
    return ["--config-value", "recipe", json.dumps(recipe.model_dump(mode="json")), *kept]


def _take_recipe(words: list[str], flow: type[FlowSpec]) -> tuple[str, list[str]]:
    """The path given by ``--config recipe PATH``, or the flow's default, and the other words."""
    for number, word in enumerate(words):
        if word == "--config" and words[number + 1 : number + 2] == ["recipe"]:
            return words[number + 2], words[:number] + words[number + 3 :]
    return str(flow.DEFAULT_RECIPE), words  # type: ignore[attr-defined]


def _recipe_source() -> str:
    words = sys.argv
    return next((words[i + 2] for i, word in enumerate(words[:-2]) if word == "--config"), "recipe")
