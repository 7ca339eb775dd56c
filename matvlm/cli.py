"""The command line, ``python -m matvlm COMMAND``: stages that are useful alone, each a few lines over the library.

Whatever a user can get wrong ends in one message on stderr and exit status 1. The whole pipeline is a flow, not a
command: see ``flows/train_flow.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from matvlm.artifacts import Checkpoint, DataManifest
from matvlm.chat.command import register as register_chat
from matvlm.config import Evaluate, Recipe
from matvlm.profile_command import register as register_profile
from matvlm.recipes import load_recipe, parse_recipe, split_overrides
from matvlm.reporting import Reporter
from matvlm.storage import StorageError
from matvlm.tracking import TrackingError, name_checkpoints, resolve_checkpoint, sync

if TYPE_CHECKING:
    from matvlm.targets import GradientReport, TargetJob

CHECKPOINTS = """\
A CHECKPOINT is one of
  runs/NAME/student            a local folder
  s3://bucket/key              a folder on S3
  package://NAME               a model that ships with matvlm
  org/name, org/name@revision  a model of the Hugging Face hub
  models:/NAME/3               a registered version in MLflow
  models:/NAME@candidate       a registered alias in MLflow
"""

WATCHING = """\
What is run for each is flows/eval_flow.py with the recipe, or COMMAND, in which {checkpoint} stands for the checkpoint:
  python -m matvlm watch RECIPE --run "sbatch --wait evaluate.sh {checkpoint}"
A checkpoint is evaluated once for each name of a recipe, however often watchers are stopped and started, and however
many there are. An evaluation goes on when its watcher is killed; the next watcher takes its result.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (by default those of the process) name; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    forwarded = words[:1] == ["lm-eval"]
    options = _parser().parse_args(words[:1] if forwarded else words)
    if forwarded:
        options.arguments = words[1:]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if options.name in ("targets", "distill", "convert", "evaluate", "chat", "demo", "profile"):
            _hide_loading_bars()
        options.command(options)
    except (ValueError, StorageError, TrackingError) as error:
        print(f"matvlm {options.name}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # DistillError and LoadError, whose modules are slow to import
        if type(error).__module__.partition(".")[0] != "matvlm":
            raise
        print(f"matvlm {options.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m matvlm", description=_first_line(sys.modules["matvlm"].__doc__))
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    def add(name: str, run: object, summary: str, epilog: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(command=run)
        return command

    command = add("inspect", _inspect, "say what a recipe will do, or what a model is and costs", CHECKPOINTS)
    what = "a recipe, for instance flows/recipes/easyvqa.yaml, or a checkpoint"
    command.add_argument("subject", metavar="RECIPE|CHECKPOINT", help=what)
    change = "change a recipe's fields first, for instance distill.epochs=2"
    changes: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "FIELD=VALUE"}
    command.add_argument("--set", help=change, **changes)

    command = add("targets", _targets, "compute the teacher's targets that a recipe needs, as far as they are missing")
    command.add_argument("recipe", metavar="RECIPE", help="for instance flows/recipes/easyvqa.yaml")
    command.add_argument("--set", help=change, **changes)
    what = "compute this shard only, counted from 0; whoever finishes the last one joins them"
    command.add_argument("--shard", type=int, metavar="I", help=what)
    command.add_argument("--out", metavar="URI", help="a folder, also on s3://; default: runs/RECIPE'S NAME/targets")
    what = "then measure the loss's gradient against the one with all of the teacher's logits, on N batches"
    command.add_argument("--check", type=_count, metavar="N", help=what)

    summary = "make what a recipe needs for it, as far as it is missing, and distil; alone or under torchrun"
    command = add("distill", _distill, summary)
    what = "a recipe, for instance flows/recipes/easyvqa.yaml, or the job.json of a distillation to go on with"
    command.add_argument("subject", metavar="RECIPE|JOB", help=what)
    command.add_argument("--set", help=change, **changes)
    command.add_argument("--out", type=Path, metavar="DIR", help="default: runs/RECIPE'S NAME")

    summary = "write one of the paper's released checkpoints as a model folder of transformers"
    command = add("convert", _convert, summary, CHECKPOINTS)
    what = "a CHECKPOINT in the layout of TinyLLaVA-Phi-2-SigLIP-3.1B or MaTVLM_0_25_Mamba2"
    command.add_argument("source", metavar="SRC", help=what)
    command.add_argument("destination", metavar="DST", help="the folder to write: a new or an empty one")

    command = add("sync", _sync, "send to MLflow what it has missed of a run")
    command.add_argument(
        "folder", metavar="FOLDER", help="the run's folder, also on s3://, the one that holds tracking/"
    )

    command = add("watch", _watch, "evaluate every new checkpoint, once, as they appear", WATCHING)
    command.add_argument("recipe", metavar="RECIPE", help="what they are evaluated by, with its promotion thresholds")
    command.add_argument("--set", help=change, **changes)
    places = command.add_mutually_exclusive_group()
    what = "look at the versions of this registered model; default: the recipe's tracking.model_name"
    places.add_argument("--registry-model", metavar="NAME", help=what)
    places.add_argument("--folder", metavar="URI", help="look at the model folders below this one, also on s3://")
    command.add_argument("--once", action="store_true", help="look once instead of going on")
    command.add_argument("--every", type=_count, default=30, metavar="SECONDS", help="default: %(default)s")
    command.add_argument("--retry", action="store_true", help="try those again whose evaluation failed before")
    command.add_argument("--run", metavar="COMMAND", help="run this for each, in place of the flow")

    summary = "let a checkpoint answer the questions of benchmarks; alone or under torchrun"
    command = add("evaluate", _evaluate, summary, CHECKPOINTS)
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("--task", action="append", metavar="NAME", help="may be repeated; by default easyvqa")
    what = "the folder with a task's data, local or on s3://; by default the hub is asked"
    command.add_argument("--data", action="append", default=[], metavar="TASK=URI", help=what)
    command.add_argument("--batch-size", type=_count, metavar="N", help="in questions")
    what = "the folder of another checkpoint's evaluation, say the teacher's, to hold this one against"
    command.add_argument("--against", type=Path, metavar="DIR", help=what)
    command.add_argument("--limit", type=_count, metavar="N", help="questions per task, evenly spaced; by default all")
    command.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: %(default)s"
    )

    register_chat(add, CHECKPOINTS)

    add("lm-eval", _lm_eval, "lm-eval's own command line, with the model matvlm and our tasks")

    register_profile(add, CHECKPOINTS)
    return parser


def _hide_loading_bars() -> None:
    """transformers' own bars for weights that are on the disk already; a download still shows its own."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _inspect(options: argparse.Namespace) -> None:
    from matvlm.inspection import describe, describe_model

    if Path(options.subject).suffix not in (".yaml", ".yml"):
        print(describe_model(resolve_checkpoint(options.subject)), end="")
        return
    print(describe(_recipe(options.subject, options.set)), end="")


def _targets(options: argparse.Namespace) -> None:
    """In one process for each GPU of this machine, unless something has started several already."""
    import torch

    from matvlm.processes import ProcessError, end_with_launcher, num_processes, run
    from matvlm.targets import missing_shards

    recipe = _recipe(options.recipe, options.set)
    shards = range(recipe.targets.shards)
    if options.shard is not None and options.shard not in shards:
        raise ValueError(f"shard {options.shard}: targets.shards={len(shards)} are 0 to {len(shards) - 1}")
    options.out = options.out or str(Path("runs", recipe.name, "targets"))
    end_with_launcher()
    if "WORLD_SIZE" not in os.environ and options.shard is None:
        resources = recipe.resources.model_copy(update={"gpu": torch.cuda.device_count()})
        count = min(num_processes(resources, _device()), len(missing_shards(options.out, len(shards))))
        if count > 1:
            changes = ["--set", *options.set] if options.set else []
            check = ["--check", str(options.check)] if options.check else []
            try:
                run(["targets", options.recipe, "--out", options.out, *changes, *check], count)
            except ProcessError as error:
                raise ProcessError(f"{error}; finished shards stay: run it again for the others") from error
            return
    _recorded(_targets_here)(options, recipe)


def _targets_here(options: argparse.Namespace, recipe: Recipe) -> None:
    """This process's part of the shards; the first one joins them when the others are done."""
    import torch

    from matvlm.data.encoding import Encoder
    from matvlm.data.prepare import prepare
    from matvlm.models import locate
    from matvlm.targets import TargetJob
    from matvlm.world import LONGEST_WAIT, join

    world, device = join(_device(), LONGEST_WAIT)
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    model, processor = locate.load(recipe.teacher.uri, device, getattr(torch, recipe.teacher.dtype))
    encoder, folder = Encoder(processor, recipe.data.max_length), Path("runs", recipe.name, "data")
    data = world.from_first(lambda: prepare(recipe.data, recipe.seed, folder, encoder=encoder))
    job = TargetJob(recipe, model, processor, data, options.out)
    missing = world.from_first(job.missing)
    finished = [shard for shard in range(recipe.targets.shards) if shard not in missing]
    mine = [shard for part in (missing, finished) for shard in part[world.rank :: world.size]]
    computed = world.gather(job.compute(mine if options.shard is None else [options.shard]))
    world.leave()
    if world.is_first:
        if samples := sum(done.samples for done in computed):
            seconds = max(done.seconds for done in computed)
            print(f"{samples:,} samples in {seconds:.1f} s: {samples / seconds:,.1f} samples/s, writing included")
        _join_targets(options, recipe, data, job)


def _join_targets(options: argparse.Namespace, recipe: Recipe, data: DataManifest, job: TargetJob) -> None:
    from matvlm.targets import read_manifest

    if missing := job.missing():
        print(f"{job.uri}: not joined, as shards are missing: {', '.join(map(str, missing))}")
        return
    job.join()
    store = read_manifest(job.uri)
    print(
        f"{job.uri}: {store.num_samples:,} samples, {store.num_positions:,} positions of "
        f"{store.bytes_per_position:.1f} B; mass of the top {store.identity.top_k}: mean {store.kept_mass_mean:.4%}, "
        f"1st percentile {store.kept_mass_p1:.4%}"
    )
    if left_out := sum(len(shard.unusable) for shard in store.shards):
        print(f"left out, as they could not be loaded: {left_out:,} sample(s); the shards' JSON files say why")
    if options.check:
        print(_gradient_table(_check_gradients(recipe, data, job, options.check)))


def _check_gradients(recipe: Recipe, data: DataManifest, job: TargetJob, batches: int) -> GradientReport:
    """At the student that the recipe starts from; layers that would have to be measured first are spread evenly."""
    import torch

    from matvlm.distill import init_student
    from matvlm.models import locate
    from matvlm.targets import check_gradients, open_targets

    if recipe.hybrid.layers == "sensitivity":
        recipe = recipe.model_copy(update={"hybrid": recipe.hybrid.model_copy(update={"layers": "even"})})
    size = recipe.targets.batch_size
    count = min(batches * size, len(job.dataset))
    rows = job.dataset.select([number * len(job.dataset) // count for number in range(count)])
    with TemporaryDirectory() as folder:
        teacher = Checkpoint(uri=recipe.teacher.uri, label="teacher")
        start = init_student(recipe, teacher, recipe.hybrid.init, data, Path(folder, "student"), device=_device())
        student, _ = locate.load(start.uri, _device(), getattr(torch, recipe.teacher.dtype))
    reader = open_targets(job.uri, job.identity)
    return check_gradients(job.model, student, job.encoder, rows, size, job.uri, reader, job.identity)


def _gradient_table(report: GradientReport) -> str:
    from matvlm.inspection import table

    rows = [["gradient error", "top", "draws", "mean", "pooled", "summed"]]
    for error in report.errors:
        shares = [f"{share:.3%}" for share in (error.mean, error.pooled, error.summed)]
        rows.append([error.scheme, str(error.top_k), str(error.samples or ""), *shares])
    place = f"{report.num_samples:,} samples, {report.num_positions:,} positions"
    return f"{table(rows)}\nof d loss / d logits at the untrained student, on {place}"


def _distill(options: argparse.Namespace) -> None:
    from matvlm.processes import end_with_launcher

    end_with_launcher()
    _recorded(_distill_here)(options)


def _recorded(command: Callable[..., None]) -> Callable[..., None]:
    """``command``; what it raises is also written where whoever started this process as one of several reads it."""
    from torch.distributed.elastic.multiprocessing.errors import record

    recorded: Callable[..., None] = record(command)
    return recorded if "TORCHELASTIC_ERROR_FILE" in os.environ else command


def _distill_here(options: argparse.Namespace) -> None:
    from matvlm.distill.job import EVENTS, EventLog, make_job, read_job
    from matvlm.world import join

    if Path(options.subject).suffix == ".json":
        if options.set or options.out:
            raise ValueError(f"{options.subject}: a job has its recipe and folder; --set and --out are for a recipe")
        job = read_job(Path(options.subject))
        world, _ = join(_device())
    else:
        recipe = _recipe(options.subject, options.set)
        world, device = join(_device())
        job = world.from_first(lambda: make_job(recipe, options.out or Path("runs", recipe.name), device))
    result = job.run(EventLog(job.folder / EVENTS), _device())
    if world.is_first:
        print(f"{result.uri}: {result.updates:,} updates, {result.trained_parameters:,} parameters trained")
    world.leave()


def _recipe(path: str, changes: Sequence[str]) -> Recipe:
    return load_recipe(path, [override for text in changes for override in split_overrides(text)])


def _convert(options: argparse.Namespace) -> None:
    folder = Path(options.destination)
    if "://" in options.destination or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"{options.destination}: not a new or empty local folder; nothing was written")
    from matvlm.models import locate, tinyllava

    source = resolve_checkpoint(options.source)
    made = tinyllava.convert(locate.locate(source), folder, source)
    layers = f"Mamba-2 in the layers {', '.join(map(str, made.layers))}" if made.layers else "all layers attention"
    print(f"{options.source}: {made.label}, {layers}, {made.parameters:,} parameters")
    print(f"written to {folder}")


def _sync(options: argparse.Namespace) -> None:
    print(f"{sync(options.folder):,} events sent")


def _watch(options: argparse.Namespace) -> None:
    from matvlm.watch import Folder, RegisteredModel, Watcher, evaluation, place_of

    recipe = _recipe(options.recipe, options.set)
    model = options.registry_model or recipe.tracking.model_name
    source = Folder(options.folder) if options.folder else RegisteredModel(model)
    command = evaluation(options.run, options.recipe, options.set)
    place = place_of(source, recipe.name, Path(os.environ.get("MATVLM_RUNS", "runs")))
    watcher = Watcher(source, recipe.name, command, place, partial(print, flush=True))
    print(f"watching {source.name} with {options.recipe}", flush=True)
    if not options.once:
        watcher.keep_on(options.every, options.retry)
    elif failed := watcher.once(options.retry):
        raise ValueError(f"no evaluation of {', '.join(failed)}; see above, and try again with --retry")


def _evaluate(options: argparse.Namespace) -> None:
    from matvlm.evaluate import compare, evaluate, read_result
    from matvlm.inspection import table
    from matvlm.report import score_table

    given = {"tasks": options.task, "data": dict(_task_data(word) for word in options.data)}
    given["batch_size"] = options.batch_size
    settings = parse_recipe(
        json.dumps({name: value for name, value in given.items() if value}), "--task and --data", kind=Evaluate
    )
    (checkpoint,) = name_checkpoints([options.checkpoint])
    other = read_result(options.against) if options.against else None
    result = evaluate(checkpoint, settings, options.limit, options.out, Reporter(), _device())
    if os.environ.get("RANK", "0") != "0":
        return
    print(table([["metric", "value"], *([name, f"{value:.4f}"] for name, value in result.metrics.items())]))
    rows = [[task, str(score), score.metric] for task, score in result.scores.items()]
    print(table([["task", "score", "metric"], *rows]))
    for task, error in result.failed.items():
        print(f"{task} failed: {error}", file=sys.stderr)
    if other:
        print(score_table(compare(other, result)), end="")
    print(f"{result.num_questions:,} questions in {result.seconds:.0f} s; every answer is in {result.samples_uri}")


def _task_data(word: str) -> tuple[str, str]:
    task, equals, uri = word.partition("=")
    if not equals:
        raise ValueError(f"--data {word}: expected TASK=URI, for instance pope=s3://bucket/POPE")
    return task, uri


def _lm_eval(options: argparse.Namespace) -> None:
    from matvlm.evaluate.adapter import run_lm_eval

    run_lm_eval(options.arguments, resolve_checkpoint)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0].partition(": ")[2]
