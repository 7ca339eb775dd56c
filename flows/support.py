"""What the flows share: reading the recipe, opening a run and its steps, and how a run is continued.

``main(Flow)`` is what each flow file ends with. It adds ``--set field.path=value`` to Metaflow's ``run``, refuses a bad
recipe before anything starts, and ends a failed run by printing the command that continues it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "matvlm").is_dir():
    sys.path.insert(0, str(ROOT))

# The bars of other libraries say nothing in a step's log; the stages' own lines stay. Read when those are imported.
for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
    os.environ.setdefault(name, "1")

import kubernetes_settings  # noqa: E402
import run_files  # noqa: E402
from metaflow import FlowSpec, Run, current  # noqa: E402
from metaflow.exception import MetaflowException  # noqa: E402
from metaflow.util import get_username  # noqa: E402

from matvlm.config import Recipe, Section  # noqa: E402
from matvlm.models.layers import check_choice  # noqa: E402
from matvlm.recipes import RecipeError, parse_recipe, split_overrides  # noqa: E402
from matvlm.reporting import Reporter, Reporters  # noqa: E402
from matvlm.storage import join  # noqa: E402
from matvlm.tracking import environment, flatten  # noqa: E402

RECIPES = ROOT / "flows" / "recipes"
KEPT_OPTIONS = ("--max-workers", "--with")
"""Of Metaflow's ``run`` and ``resume``: whoever continues a run wants them again."""
KEPT_VARIABLE = "MATVLM_RUN_OPTIONS"
"""Tells the steps of a run its kept options."""
Kind = TypeVar("Kind", bound=Section)


def open_run(recipe: Any, **tags: str) -> tuple[str, str]:
    """Name a new run, make its folder, open its MLflow run. The names are artifacts, so a resumed run keeps them.

    Returns:
        The run's key, under which MLflow finds its runs again, and where its files are.
    """
    run_key = f"{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = join(run_files.runs_uri(), run_key)
    _set_threads(recipe)
    tags |= {"flow": current.flow_name, "metaflow_run": current.run_id, "recipe": recipe.name}
    with run_files.tracker(run_key, folder, recipe.tracking.experiment, current.step_name) as tracker:
        tracker.parent({**flatten(recipe.model_dump(mode="json")), **environment()}, tags)
    print(f"Files of this run: {folder}\nIf it is interrupted: {resume_command(current.run_id)}")
    return run_key, folder


@contextmanager
def stage(
    flow: Any, recipe: Any, name: str, *listeners: Reporter, params: Mapping[str, str] | None = None
) -> Iterator[Reporter]:
    """The MLflow run of one step, and what else listens to it; sets the recipe's number of torch threads.

    Whatever the block writes in the run's folder is kept there, from time to time and when it ends. ``params`` are
    those of a step that has some of its own.
    """
    _set_threads(recipe)
    with clear_errors(name), run_files.tracking(flow, recipe) as tracker, tracker.step(name) as run:
        if params:
            run.params(params)
        yield Reporters(run, *listeners)


def _set_threads(recipe: Any) -> None:
    import torch

    torch.set_num_threads(recipe.resources.of(current.step_name).cpu)


class StepError(MetaflowException):
    """An error that its message explains: Metaflow prints it as two lines and not as a traceback."""

    def __init__(self, step: str, error: Exception):
        super().__init__(str(error))
        self.headline = f"{step} cannot go on"


@contextmanager
def clear_errors(step: str) -> Iterator[None]:
    """Turn the library's own errors, written for users, into a ``StepError``; others keep their tracebacks."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "matvlm":
            raise
        raise StepError(step, error) from error


def device(task: int | None = None) -> str:
    """Where a step computes; tasks of a foreach that give their number take turns at the GPUs of a machine."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if task is None else f"cuda:{task % torch.cuda.device_count()}"


def load_teacher(recipe: Any, device: str = "cpu") -> tuple[Any, Any]:
    """Model and processor of ``recipe.teacher``."""
    import torch

    from matvlm.models import locate

    return locate.load(recipe.teacher.uri, device, getattr(torch, recipe.teacher.dtype))


def check_layers(recipe: Recipe, num_layers: int | None = None) -> None:
    """Refuse a choice of layers that the teacher cannot have.

    Args:
        recipe: its ``hybrid`` section is checked.
        num_layers: decoder layers of the teacher. By default its config.json is asked, where that is at hand: for a
            teacher on S3 or the hub nothing is checked then.

    Raises:
        RecipeError: none or all of the layers would be replaced, or some that do not exist.
    """
    num_layers = num_layers or _layers_at_hand(recipe.teacher.model)
    try:
        if num_layers:
            check_choice(num_layers, recipe.hybrid.ratio, recipe.hybrid.layers)
    except ValueError as error:
        raise RecipeError(f"hybrid: {error} (teacher: {recipe.teacher.model})") from None


def _layers_at_hand(teacher: str) -> int | None:
    """The number of decoder layers, without the seconds that importing torch takes."""
    shipped = teacher.removeprefix("package://")
    folder = Path(teacher) if shipped == teacher else ROOT / "matvlm" / "assets" / shipped
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("text_config", config)["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whoever loads the model says what is wrong with it


def file_name(label: str) -> str:
    """``label`` as a folder name: "student, untrained" -> "student-untrained"."""
    return "-".join(re.findall(r"\w+", label))


def script() -> str:
    """The flow's file as one would type it from the project's root."""
    return f"flows/{Path(sys.argv[0]).name}"


def resume_command(run_id: str) -> str:
    """What to type in the folder where the run was started; a bare ``resume`` may go back to an earlier attempt."""
    in_pod = "METAFLOW_KUBERNETES_WORKLOAD" in os.environ  # which does not know the options of whoever started the run
    options = "--with kubernetes" if in_pod else os.environ.get(KEPT_VARIABLE, "")
    return f"python {script()} resume --origin-run-id {run_id} {options}".rstrip()


def parse(text: str, kind: type[Kind], default: str = "recipe") -> dict[str, Any]:
    """A recipe's text as the JSON-able dict that Metaflow stores with the run; ``default`` names it if nobody did."""
    return parse_recipe(text, source=_recipe_source(default), kind=kind).model_dump(mode="json")


def main(flow: type[FlowSpec], kind: type[Kind], check: Callable[[Kind], None] = lambda recipe: None) -> None:
    """Run ``flow`` from the command line; ``check`` may refuse a recipe with a ``RecipeError``."""
    if get_username() is None:  # Metaflow does not run for root; `make` gives the same name
        os.environ["USERNAME"] = "matvlm"
    command = next((word for word in sys.argv[1:] if word in ("run", "resume")), None)
    if command is None:
        flow()
        return
    try:
        sys.argv[1:] = _with_overrides(sys.argv[1:], flow, kind, check)
    except RecipeError as error:
        sys.exit(str(error))
    if lacking := kubernetes_settings.problem(sys.argv[1:]):
        sys.exit(lacking)
    os.environ[KEPT_VARIABLE] = _kept_options(sys.argv)
    with tempfile.TemporaryDirectory() as scratch:
        run_id_file = Path(scratch) / "run_id"
        if "--run-id-file" in sys.argv[:-1]:
            run_id_file = Path(sys.argv[sys.argv.index("--run-id-file") + 1])
        else:
            sys.argv += ["--run-id-file", str(run_id_file)]
        try:
            flow()
        except SystemExit as stop:
            if stop.code and run_id_file.exists():
                _after_failure(flow.__name__, run_id_file.read_text().strip())
            raise


def _after_failure(flow_name: str, run_id: str) -> None:
    """Close the MLflow run as failed and say how to go on; a run that failed in its start has nothing to continue."""
    try:
        started = Run(f"{flow_name}/{run_id}", _namespace_check=False)["start"].task.data
        run_key, folder, recipe = started.run_key, started.folder, started.recipe
    except (MetaflowException, KeyError, AttributeError):
        return
    experiment = recipe.get("recipe", recipe)["tracking"]["experiment"]  # of a sweep, its base recipe's
    run_files.close(run_key, folder, experiment, "FAILED", "launcher")
    print(f"\nThe run stopped. Continue it with:\n    {resume_command(run_id)}", file=sys.stderr)


def _with_overrides(
    words: list[str], flow: type[FlowSpec], kind: type[Kind], check: Callable[[Kind], None]
) -> list[str]:
    """Replace ``--set a=b c=d`` and the recipe it changes by the resolved recipe."""
    overrides, words = _take_overrides(words)
    if "resume" in words:
        if overrides:
            raise RecipeError("--set: a resumed run keeps its recipe; start a new run to change it")
        return words
    source, words = _take_recipe(words, flow)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: cannot read the recipe: {error.strerror}") from None
    recipe = parse_recipe(text, source=source, overrides=overrides, kind=kind)
    try:
        check(recipe)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    workers = getattr(recipe, "max_parallel", None)
    if workers and not any(word.partition("=")[0] == "--max-workers" for word in words):
        words = [*words, "--max-workers", str(workers)]
    return ["--config-value", "recipe", json.dumps(recipe.model_dump(mode="json")), *words]


def _kept_options(words: list[str]) -> str:
    kept = [words[i : i + 2] for i, word in enumerate(words) if word in KEPT_OPTIONS]
    kept += [[word] for word in words if word.partition("=")[0] in KEPT_OPTIONS and "=" in word]
    return shlex.join(word for option in kept for word in option)


def _take_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The overrides given by ``--set a=b c=d``, ``--set "a=b c=d"`` or ``--set=a=b``, and the other words."""
    overrides: list[str] = []
    kept: list[str] = []
    setting = False
    for word in words:
        if word == "--set":
            setting = True
        elif word.startswith("--set="):
            overrides += split_overrides(word.removeprefix("--set="))
        elif setting and not word.startswith("--"):
            overrides += split_overrides(word)
        else:
            setting = False
            kept.append(word)
    return overrides, kept


def _take_recipe(words: list[str], flow: type[FlowSpec]) -> tuple[str, list[str]]:
    """The path given by ``--config recipe PATH``, or the flow's default, and the other words."""
    for number, word in enumerate(words):
        if word == "--config" and words[number + 1 : number + 2] == ["recipe"]:
            return words[number + 2], words[:number] + words[number + 3 :]
    return str(flow.DEFAULT_RECIPE), words


def _recipe_source(default: str) -> str:
    words = sys.argv
    return next((words[i + 2] for i, word in enumerate(words[:-2]) if word == "--config"), default)
