"""The stages ``init_hybrid`` and ``distill``: make a student, train it with snapshots, save it.

Everything an update does is a function of the recipe and of the update's number: the samples (``order``), the learning
rate (``learning_rate``), the losses divided by counts over the whole batch. Nothing is drawn at random, so a run that
continues from a snapshot repeats exactly what an uninterrupted one would have done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from matvlm import storage
from matvlm.artifacts import Checkpoint, DataManifest, TargetStore
from matvlm.config import Recipe
from matvlm.data.encoding import Encoder
from matvlm.data.held_out import split
from matvlm.data.prepare import encode_rows, open_dataset
from matvlm.distill.failures import DistillError
from matvlm.distill.feed import Feed, Share
from matvlm.distill.publishing import Publisher
from matvlm.distill.run import Run, open_models
from matvlm.distill.schedule import num_updates, order
from matvlm.distill.tracing import tracing
from matvlm.distill.validation import Validation
from matvlm.init import CALIBRATED, convert_
from matvlm.models import hybrid, locate
from matvlm.models.layers import choose_layers
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.snapshots import SnapshotError, Snapshots, cpu_copy
from matvlm.storage import read_json, write_json
from matvlm.targets import Identity, open_targets
from matvlm.teacher import fingerprint
from matvlm.world import World, join

MODEL, RESULT = "model", "checkpoint.json"

_FREE_TO_CHANGE = (
    "checkpoint_every_updates",
    "publish_every_updates",
    "keep_checkpoints",
    "log_every_updates",
    "profile_updates",
    "engine",
    "deepspeed",
    "micro_batch_size",
    "packing",
    "workers",
    "snapshots",
    "activation_checkpointing",
    "compile",
    "cuda_graphs",
    "max_skipped_updates",
)
"""Fields of ``recipe.distill`` that do not change what is computed, but for rounding."""


def init_student(
    recipe: Recipe,
    teacher: Checkpoint,
    init: str,
    data: DataManifest,
    folder: Path,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
) -> Checkpoint:
    """Replace attention by Mamba-2 in a copy of ``teacher`` and save the untrained hybrid to ``folder``.

    Args:
        data: ``aligned`` is calibrated on its first samples in the order of training.
        layers: which to replace; None chooses by ``recipe.hybrid``, where nothing needs to be measured for that.

    Raises:
        ValueError: the layers cannot be chosen or replaced (see ``choose_layers``, ``convert_``).
    """
    settings = recipe.hybrid
    model, processor = locate.load(teacher.uri, device, getattr(torch, recipe.teacher.dtype))
    rule = settings.layers if layers is None else layers
    chosen = choose_layers(len(hybrid.decoder_layers(model)), settings.ratio, rule)
    batches = (
        _calibration_batches(recipe, data, Encoder(processor, recipe.data.max_length)) if init in CALIBRATED else ()
    )
    convert_(model, chosen, init, recipe.seed, settings.chunk_size, settings.kernels, batches)
    hybrid.save(model, processor, folder, {"teacher": teacher.uri, "seed": recipe.seed})
    return Checkpoint(
        uri=str(folder),
        label="student",
        init=init,
        layers=chosen,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _calibration_batches(recipe: Recipe, data: DataManifest, encoder: Encoder) -> Iterator[Mapping[str, torch.Tensor]]:
    dataset, _ = split(open_dataset(data), recipe.distill.validation.samples)
    size = recipe.distill.micro_batch_size
    count = min(recipe.hybrid.calibration_samples, len(dataset))
    rows = order(len(dataset), count, recipe.seed, update=1) if count else []
    for start in range(0, len(rows), size):
        yield encode_rows(encoder, (dataset[row] for row in rows[start : start + size])).inputs


def distill(
    recipe: Recipe,
    student: Checkpoint,
    teacher: Checkpoint,
    data: DataManifest,
    targets: TargetStore,
    folder: Path,
    reporter: Reporter,
    device: str,
) -> Checkpoint:
    """Train the mixers and the connector of ``student`` and save it to ``folder/model``.

    Continues from the newest intact snapshot, which any number of processes may have written; a finished run in
    ``folder`` is returned as it is. What is trained is kept and saved in float32, the rest in ``recipe.teacher.dtype``.
    Where torchrun has started several processes, each calls this. The first one alone looks into ``folder`` and at the
    snapshots, writes and reports; the inputs may be at another place for each, as long as they are the same.

    Raises:
        SnapshotError: what is in ``folder`` was made with another recipe, data or student.
        TargetError: the target store is damaged, of another teacher, other data or other settings, or lacks a sample.
        DistillError: too many updates were skipped for a loss or gradient that is not finite, too many samples cannot
            be loaded any more, memory ran out, or the processes were given different inputs.
        LoadError: the data cannot be reached any more.
        ValueError: ``student`` was not made from ``teacher``, DeepSpeed is asked for and not installed, or validation
            would leave nothing to train on.
        StorageError: a snapshot or the model cannot be written.
    """
    identity = _identity(recipe, student, data, targets)
    world, device = join(device)
    if finished := world.from_first(lambda: _finished(folder, identity)):
        return finished
    if not world.is_first:
        reporter = Reporter()
    run, feed, held_out, snapshots = _open(recipe, student, teacher, data, targets, folder, device, world)
    total = num_updates(recipe.distill, len(feed.dataset))
    history: list[dict[str, float]] = []
    done = _continue(run, snapshots, history, reporter)
    publisher = Publisher(run, feed.encoder.processor, teacher, folder, snapshots.identity, reporter)
    publisher.repeat(done)
    validation = Validation(run, held_out, history, reporter)
    if not done:
        validation.at(0, total)
    progress = Progress(total, f"distill {student.init}", "update", reporter, done)
    with _writing(snapshots, world), progress:
        _train(run, feed, snapshots, publisher, validation, range(done + 1, total + 1), history, progress)
    result = student.model_copy(
        update={"uri": str(folder / MODEL), "updates": total, "trained_parameters": run.trained_parameters}
    )
    publisher.save(total, folder / MODEL)
    if world.is_first:
        _draw(history, folder / "loss_curves.png", reporter)
        write_json(folder / RESULT, {"checkpoint": result.model_dump(mode="json"), "identity": identity})
    world.wait()
    return result


def _train(
    run: Run,
    feed: Feed,
    snapshots: Snapshots,
    publisher: Publisher,
    validation: Validation,
    updates: range,
    history: list[dict[str, float]],
    progress: Progress,
) -> None:
    """Make ``updates``; adds to ``history`` what is logged."""
    settings, total = run.recipe.distill, updates.stop - 1
    folder, reporter = publisher.folder, publisher.reporter
    traced = settings.profile_updates if run.world.is_first else 0
    losses: list[float] = []
    with tracing(traced, folder, run.device, reporter) as trace:
        for update, share in zip(updates, feed.shares(updates.start, total), strict=True):
            values = run.update(update, total, share)
            trace()
            aligning = update <= settings.align.updates
            losses += [values["loss"]] if "loss" in values and not aligning else []  # the stages do not compare
            progress.update(1, loss=values.get("loss", "skipped"), **({"stage": "align"} if aligning else {}))
            if update % settings.log_every_updates == 0 or update == total:
                history.append({"update": update, **values})
                reporter.metrics(values | run.speed.rates(), update)
            validation.at(update, total)
            if update % settings.checkpoint_every_updates == 0 and update < total:
                snapshots.wait()  # its state is let go of before there is another one
                state = run.state() | {"history": cpu_copy(history)}
                if run.world.is_first:
                    snapshots.save(update, state, score=sum(losses) / len(losses) if losses else None)
                losses.clear()
            publisher.publish(update, total)


def _open(
    recipe: Recipe,
    student: Checkpoint,
    teacher: Checkpoint,
    data: DataManifest,
    targets: TargetStore,
    folder: Path,
    device: str,
    world: World,
) -> tuple[Run, Feed, Share | None, Snapshots]:
    model, original, processor = open_models(recipe, student, teacher, device)
    needed = Identity.of(recipe, data, processor, fingerprint(original))
    reader = open_targets(targets.uri, needed)
    identity = _identity(recipe, student, data, targets) | {"student": fingerprint(model)}
    _refuse_different(world.gather(identity))
    place = recipe.distill.snapshots
    place = str(folder / "snapshots") if place is None else storage.join(place, *folder.absolute().parts[-3:])
    snapshots = Snapshots(place, identity, recipe.distill.keep_checkpoints)
    encoder = Encoder(processor, recipe.data.max_length, recipe.targets.positions)
    dataset, rest = split(open_dataset(data), recipe.distill.validation.samples)
    feed = Feed(recipe, dataset, encoder, world, device.startswith("cuda"), reader.unusable)
    held_out = feed.share_of(rest) if len(rest) else None
    most = int(recipe.data.max_bad_share * len(feed.dataset))
    return Run(recipe, device, model, original, reader, world, most), feed, held_out, snapshots


def _continue(run: Run, snapshots: Snapshots, history: list[dict[str, float]], reporter: Reporter) -> int:
    """Load the newest intact snapshot, if there is one; returns the updates that are done."""
    latest = run.world.from_first(snapshots.latest)
    if latest:
        run.load_state(latest[1])
        history += latest[1]["history"]
    for past in history:  # for whoever shows the whole curve; MLflow has these points already
        reporter.metrics({name: value for name, value in past.items() if name != "update"}, int(past["update"]))
    return latest[0] if latest else 0


def _refuse_different(identities: Sequence[dict[str, Any]]) -> None:
    """Processes on machines of their own may each have other files."""
    for rank, theirs in enumerate(identities):
        for field, ours in identities[0].items():
            if theirs[field] != ours:
                raise DistillError(
                    f"{field} is {theirs[field]!r} for rank {rank} and {ours!r} for rank 0: every node needs the same "
                    "recipe, student, data and targets"
                )


def _writing(snapshots: Snapshots, world: World) -> AbstractContextManager[Any]:
    return snapshots if world.is_first else nullcontext()


def _identity(recipe: Recipe, student: Checkpoint, data: DataManifest, targets: TargetStore) -> dict[str, Any]:
    """What a run shares with the one that it continues, as JSON has it; the weights come on top."""
    return {
        "distill": recipe.distill.model_dump(mode="json", exclude=set(_FREE_TO_CHANGE)),
        "seed": recipe.seed,
        "init": student.init,
        "layers": student.layers,
        "data": data.fingerprint,
        "targets": targets.identity,
    }


def _finished(folder: Path, identity: dict[str, Any]) -> Checkpoint | None:
    place = folder / RESULT
    if not place.exists():
        return None
    try:
        record = read_json(place)
        result, found = Checkpoint.model_validate(record["checkpoint"]), dict(record["identity"])
    except (KeyError, TypeError, ValueError):
        raise SnapshotError(f"{place}: not the record of a finished distillation; remove it to train again") from None
    for field, ours in identity.items():
        if found.get(field) != ours:
            raise SnapshotError(
                f"{place}: {field} was {found.get(field)!r} in the finished run there and is {ours!r} in this one; use "
                "another folder, or remove this one to start over"
            )
    return result


def _draw(history: list[dict[str, float]], path: Path, reporter: Reporter) -> None:
    from matvlm.plots import loss_curves

    if any("loss" in row for row in history):  # not if each of the few logged updates was skipped
        loss_curves(history, path)
        reporter.artifact(path, "plots")


__all__ = ["DistillError", "distill", "init_student"]
