"""The command line, ``python -m matvlm COMMAND``: stages that are useful alone, each a few lines over the library.

Whatever a user can get wrong ends in one message on stderr and exit status 1. The whole pipeline is a flow, not a
command: see ``flows/train_flow.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from matvlm.artifacts import Checkpoint, DataManifest, ProfileResult
from matvlm.config import Evaluate, Profile, Recipe
from matvlm.recipes import load_recipe, split_overrides
from matvlm.reporting import Reporter
from matvlm.storage import StorageError, write_json
from matvlm.tracking import TrackingError, resolve_checkpoint, sync
from matvlm.tracking.registry import SCHEME

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (by default those of the process) name; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if options.name in ("targets", "distill", "convert", "evaluate", "profile"):
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
    command.add_argument("folder", metavar="FOLDER", help="the run's folder, the one that holds tracking/")

    command = add("evaluate", _evaluate, "let a checkpoint answer the questions of a task", CHECKPOINTS)
    command.add_argument("checkpoint", metavar="CHECKPOINT")
    command.add_argument("--task", action="append", metavar="NAME", help="may be repeated; by default easyvqa")
    command.add_argument("--limit", type=_count, metavar="N", help="questions per task, evenly spaced; by default all")
    command.add_argument(
        "--out", type=Path, default=Path("runs/evaluation"), metavar="DIR", help="default: %(default)s"
    )

    defaults = Profile()
    command = add("profile", _profile, "measure speed and memory of checkpoints side by side", CHECKPOINTS)
    command.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="the first is what the others are held against"
    )
    contexts = " ".join(map(str, defaults.contexts))
    command.add_argument("--contexts", nargs="+", type=_count, metavar="N", help=f"in tokens; default: {contexts}")
    command.add_argument("--repeats", type=_count, default=defaults.repeats, metavar="N", help="default: %(default)s")
    command.add_argument("--out", type=Path, metavar="FILE", help="also write every figure to this JSON file")
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
    import torch

    from matvlm.data.encoding import Encoder
    from matvlm.data.prepare import prepare
    from matvlm.models import locate
    from matvlm.targets import TargetJob, read_manifest

    recipe = _recipe(options.recipe, options.set)
    shards = range(recipe.targets.shards)
    if options.shard is not None and options.shard not in shards:
        raise ValueError(f"shard {options.shard}: targets.shards={len(shards)} are 0 to {len(shards) - 1}")
    folder = Path("runs", recipe.name)
    model, processor = locate.load(recipe.teacher.uri, _device(), getattr(torch, recipe.teacher.dtype))
    encoder = Encoder(processor, recipe.data.max_length)
    data = prepare(recipe.data, recipe.seed, folder / "data", encoder=encoder)
    job = TargetJob(recipe, model, processor, data, options.out or str(folder / "targets"))
    for shard in shards if options.shard is None else [options.shard]:
        job.compute(shard)
    if job.computed_samples:
        rate = job.computed_samples / job.seconds
        print(f"{job.computed_samples:,} samples in {job.seconds:.1f} s: {rate:,.1f} samples/s, writing included")
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
    from torch.distributed.elastic.multiprocessing.errors import record

    from matvlm.distill.launch import end_with_launcher

    end_with_launcher()
    told = "TORCHELASTIC_ERROR_FILE" in os.environ  # whoever started this process reads its error there
    (record(_distill_here) if told else _distill_here)(options)


def _distill_here(options: argparse.Namespace) -> None:
    from matvlm.distill.job import EVENTS, EventLog, make_job, read_job
    from matvlm.distill.world import join

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


def _evaluate(options: argparse.Namespace) -> None:
    from matvlm.evaluate import evaluate
    from matvlm.inspection import table

    (checkpoint,) = _checkpoints([options.checkpoint])
    settings = Evaluate(tasks=options.task) if options.task else Evaluate()
    result = evaluate(checkpoint, settings, options.limit, options.out, Reporter(), _device())
    print(table([[name, f"{value:.2%}"] for name, value in result.metrics.items()]))
    print(f"{result.num_questions:,} questions in {result.seconds:.0f} s; every answer is in {result.samples_uri}")


def _profile(options: argparse.Namespace) -> None:
    from matvlm.profiling import profile

    chosen = {"contexts": options.contexts} if options.contexts else {}
    settings = Profile(repeats=options.repeats, **chosen)
    result = profile(_checkpoints(options.checkpoints), settings, Reporter(), _device())
    if options.out:
        write_json(options.out, result.model_dump(mode="json"))
    print(_profile_table(result))
    print(*(f"{name}: {value}" for name, value in result.machine.items()), sep="\n")


def _profile_table(result: ProfileResult) -> str:
    """Every point in figures, and after ``x`` as ratio to the first model, above 1 meaning more of it."""
    from matvlm.inspection import table
    from matvlm.profiling import compare

    ratios = {(row.label, row.context): row for row in compare(result, baseline=result.points[0].label)}
    rows = [["", "context", "prefill ms", "speed", "decode tokens/s", "speed", "cache MiB", "size"]]
    for point in result.points:
        ratio = ratios.get((point.label, point.context))
        held = (ratio.prefill_speed, ratio.decode_speed, ratio.cache_bytes) if ratio else ()
        prefill, decode, cache = [f"x {value:.2f}" for value in held] or [""] * 3
        rows.append(
            [
                point.label,
                f"{point.context:,}",
                f"{point.prefill_seconds * 1000:,.1f}",
                prefill,
                f"{point.decode_tokens_per_second:,.1f}",
                decode,
                f"{point.cache_bytes / 2**20:,.2f}",
                cache,
            ]
        )
    return table(rows)


def _checkpoints(specs: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints, labelled by the last part of their names, or by the whole names where these are alike."""
    labels = [_label(spec) for spec in specs]
    labels = labels if len(set(labels)) == len(labels) else list(specs)
    return [Checkpoint(uri=resolve_checkpoint(spec), label=label) for spec, label in zip(specs, labels, strict=True)]


def _label(spec: str) -> str:
    if spec.startswith(SCHEME):
        return spec.removeprefix(SCHEME)
    return spec.rstrip("/").rpartition("/")[2]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0].partition(": ")[2]
