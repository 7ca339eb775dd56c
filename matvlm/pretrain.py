"""Trains a teacher on easy-VQA's own training split: a LLaVA from nothing, or one on a pre-trained language model.

Each training sample is one image with one to ``max_turns`` of its questions, as a conversation; few turns, because
later answers can be read off earlier ones without looking. The image is shifted at random (its shape stays inside the
frame) and mirrored. The loss is cross-entropy on the answers. A few training images are held out to watch
generalisation; the package's test split is never looked at here.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from matvlm.artifacts import Checkpoint, DataManifest, EvalResult
from matvlm.config import Count, Data, Evaluate, Resources, Section, Share, Tracking
from matvlm.data.corpus import Conversations, Corpus, augment
from matvlm.data.encoding import IGNORE, Encoder
from matvlm.data.prepare import open_dataset, turns_of
from matvlm.models import grafted, hybrid, small
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.snapshots import Snapshots, cpu_copy
from matvlm.storage import put, write_bytes
from matvlm.teacher import head

LOG_EVERY_UPDATES = 50


class Training(Section):
    updates: Count = 10_000
    batch_size: Count = 1024
    """Images per update; all of one update come with the same number of questions, drawn from 1 ... ``max_turns``."""
    max_turns: Count = 3
    lr: float = 1.0e-3
    text_lr_share: Share = 1.0
    """Of ``lr``, for the language model; 0 leaves it as it is."""
    autocast: Literal["off", "bfloat16"] = "off"
    weight_decay: float = 0.05
    warmup_updates: Count = 500
    clip_grad_norm: float = 1.0
    held_out_images: Count = 200
    evaluate_every_updates: Count = 1000
    checkpoint_every_updates: Count = 1000


def _kind(model: Any) -> str:
    named = isinstance(model, dict) and "language_model" in model
    return "(grafted)" if named or isinstance(model, grafted.GraftedVLM) else "(small)"


Model = Annotated[
    Annotated[small.SmallVLM, Tag("(small)")] | Annotated[grafted.GraftedVLM, Tag("(grafted)")], Discriminator(_kind)
]
"""With a ``language_model`` it is put on one that is there already."""


class PretrainRecipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    data: Data = Data()
    model: Model = small.SmallVLM()
    training: Training = Training()
    evaluate: Evaluate = Evaluate()
    publish: str | None = None
    """Where the finished teacher is copied, local or ``s3://``, for recipes that name it; null leaves it in the run."""
    tracking: Tracking = Tracking()
    resources: Resources = Resources()


def pretrain(recipe: PretrainRecipe, data: DataManifest, folder: Path, reporter: Reporter, device: str) -> Checkpoint:
    """Train the VLM and write it, in fp16, to ``folder/model``; continues from a snapshot in ``folder``.

    Whatever is drawn at random is a function of (seed, update), so a snapshot needs no generator's state.

    Raises:
        ValueError: the images are not as many pixels as the model takes wide and high, or too few to hold some out.
        ModelFolderError: there is no such language model.
        SnapshotError: ``folder`` holds snapshots of another recipe or other data.
    """
    settings = recipe.training
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    rows = open_dataset(data)
    model, processor = _build(recipe, rows)
    model = model.to(device)
    corpus = Corpus(rows, Encoder(processor), processor.image_processor.size["height"], device)
    held_out, training = _hold_out(len(rows), settings.held_out_images, recipe.seed)
    optimizer = _optimizer(model, settings)
    identity = {"data": data.fingerprint, **recipe.model_dump(mode="json", include={"seed", "model", "training"})}
    snapshots = Snapshots(folder / "snapshots", identity)
    done = _restore(snapshots, model, optimizer)
    conversations = Conversations(
        corpus.turns, training, settings.batch_size, settings.max_turns, recipe.seed, processor.tokenizer.pad_token_id
    )
    workers = 4 if device.startswith("cuda") else 0
    batches = DataLoader(conversations, None, sampler=range(done, settings.updates), num_workers=workers)
    with snapshots, Progress(settings.updates, "pretrain", "update", reporter, initial=done) as progress:
        for update, (chosen, ids, labels) in enumerate(batches, start=done + 1):
            lr = _set_lr(optimizer, settings, update)
            pixels = augment(corpus, chosen, torch.Generator().manual_seed(recipe.seed * 1_000_003 + update))
            with _running(settings, device):
                loss = _loss(model, pixels, ids.to(device), labels.to(device))
            norm = _step(model, optimizer, loss, settings.clip_grad_norm)
            values = {}
            if update % LOG_EVERY_UPDATES == 0:
                values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
                reporter.metrics(values, update)
            progress.update(1, **values)
            if update % settings.evaluate_every_updates == 0 or update == settings.updates:
                with _running(settings, device):
                    reporter.metrics({"held_out_accuracy": _accuracy(model, corpus, held_out)}, update)
            if update % settings.checkpoint_every_updates == 0:
                state = {"model": _trained(model), "optimizer": optimizer.state_dict()}
                snapshots.save(update, cpu_copy(state))
    return _finish(model, processor, recipe, folder / "model")


def publish(recipe: PretrainRecipe, folder: Path) -> str | None:
    """Copy the teacher in ``folder`` to where the recipe wants it; returns that place.

    Raises:
        StorageError: it cannot be written there.
    """
    if recipe.publish:
        put(folder, recipe.publish)
    return recipe.publish


def _build(recipe: PretrainRecipe, rows: Any) -> tuple[Any, Any]:
    """Model and processor; what is not to be trained has no gradient."""
    if isinstance(recipe.model, grafted.GraftedVLM):
        model, processor = grafted.build(recipe.model, recipe.seed)
    else:
        texts = [text for row in rows.remove_columns("image") for turn in turns_of(row) for text in turn]
        processor = small.build_processor(recipe.model, small.build_tokenizer(texts))
        model = small.build_model(recipe.model, processor.tokenizer, seed=recipe.seed)
    if not recipe.training.text_lr_share:
        for parameter in _text_parameters(model):
            parameter.requires_grad_(False)
    return model, processor


def _text_parameters(model: Any) -> list[torch.nn.Parameter]:
    return [*model.get_decoder().parameters(), *model.lm_head.parameters()]


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _running(settings: Training, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=settings.autocast != "off")


def _finish(model: Any, processor: Any, recipe: PretrainRecipe, folder: Path) -> Checkpoint:
    model = model.eval().to("cpu", torch.float16)
    hybrid.save(model, processor, folder, {"recipe": recipe.model_dump(mode="json")})
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in _trained(model).values())
    updates = recipe.training.updates
    return Checkpoint(uri=str(folder), label="teacher", updates=updates, parameters=count, trained_parameters=trained)


def _loss(model: Any, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens. Right padding needs no mask: causal positions never look at it.

    The head sees nothing but the positions before answer tokens.
    """
    hidden = model.base_model(input_ids=ids, pixel_values=pixels, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORE
    return F.cross_entropy(head(model, hidden[:, :-1][wanted]).float(), labels[:, 1:][wanted])


def _hold_out(images: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the images held out and of those to train on."""
    if held_out >= images:
        raise ValueError(f"training.held_out_images is {held_out} and there are only {images} images")
    order = np.random.default_rng(seed).permutation(images)
    return order[:held_out], order[held_out:]


def _optimizer(model: Any, settings: Training) -> torch.optim.AdamW:
    """Weight decay for matrices only; each group with its ``share`` of the learning rate."""
    text = {id(parameter) for parameter in _text_parameters(model)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in _trained(model).values():
        share = settings.text_lr_share if id(parameter) in text else 1.0
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((share, decay), []).append(parameter)
    made = [{"params": found, "weight_decay": decay, "share": share} for (share, decay), found in groups.items()]
    return torch.optim.AdamW(made, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _set_lr(optimizer: torch.optim.AdamW, settings: Training, update: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    left = max(0.0, (update - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates))
    lr = settings.lr * min(update / settings.warmup_updates, 0.01 + 0.99 * (1 + math.cos(math.pi * left)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    return lr


def _step(model: torch.nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, clip: float) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return norm


def _restore(snapshots: Snapshots, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> int:
    latest = snapshots.latest()
    if latest is None:
        return 0
    update, state = latest
    model.load_state_dict({**model.state_dict(), **state["model"]})
    optimizer.load_state_dict(state["optimizer"])
    return update


@torch.no_grad()
def _accuracy(model: torch.nn.Module, corpus: Corpus, images: np.ndarray) -> float:
    """Share of held-out questions, each asked alone, whose every answer token is the most likely one."""
    right = total = 0
    for image in images:
        turns = corpus.turns[image]
        rows = [torch.tensor(turn.first + turn.answer) for turn in turns]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(corpus.images.device)
        pixels = corpus.scaled(slice(image, image + 1)).expand(len(turns), -1, -1, -1)
        best = model(input_ids=ids, pixel_values=pixels).logits.argmax(dim=-1).cpu()
        for row, turn in zip(best, turns, strict=True):
            start = len(turn.first) - 1
            right += row[start : start + len(turn.answer)].tolist() == turn.answer
            total += 1
    return right / total


def write_card(folder: Path, recipe: PretrainRecipe, teacher: Checkpoint, result: EvalResult) -> None:
    """The model card, README.md in the model's ``folder``: what it is, the command that makes it, its scores."""
    card = CARD.format(
        model=_described(recipe),
        parameters=f"{teacher.parameters:,}",
        trained=f"{teacher.trained_parameters:,}",
        updates=f"{teacher.updates:,}",
        name=recipe.name,
        questions=f"{result.num_questions:,}",
        scores="\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(result.metrics.items())),
        torch=torch.__version__,
    )
    write_bytes(str(folder / "README.md"), card.encode())


def _described(recipe: PretrainRecipe) -> str:
    sizes = recipe.model
    if isinstance(sizes, grafted.GraftedVLM):
        kept = ", whose weights are unchanged" if not recipe.training.text_lr_share else ""
        return f"the tower of {sizes.vision_model}, 2-layer MLP connector, {sizes.language_model}{kept}"
    return f"SigLIP-style tower, 2-layer MLP connector, {sizes.layers}-layer Phi decoder, all from nothing"


CARD = """# easy-VQA teacher

A LLaVA-architecture vision-language model ({model})
with {parameters} parameters, of which {trained} were trained, stored in fp16. It answers questions about the colour and
shape of one drawn figure.

Made by `python flows/teacher_flow.py --config recipe flows/recipes/{name}.yaml run` ({updates} updates)
from the training split of the `easy-vqa` package (MIT licence). Scores on that package's test split, {questions}
questions about images never trained on (measured with torch {torch}):

| metric | value |
| --- | --- |
{scores}
"""
