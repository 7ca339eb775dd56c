"""Trains the small teacher: a LLaVA of at most 3 M parameters, from nothing, on easy-VQA's own training split.

Each training sample is one image with one to ``max_turns`` of its questions, as a conversation; few turns, because later
answers can be read off earlier ones without looking. The image is shifted at random (its shape stays inside the frame) and
mirrored. The loss is cross-entropy on the answers. A few training images are held out to watch generalisation; the
package's test split is never looked at here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from matvlm.artifacts import Checkpoint, DataManifest, EvalResult
from matvlm.config import Count, Data, Evaluate, Resources, Section, Tracking
from matvlm.data.encoding import IGNORE, Encoder, Turn
from matvlm.data.prepare import open_dataset, turns_of
from matvlm.models import hybrid, small
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.snapshots import Snapshots
from matvlm.storage import write_bytes


class Training(Section):
    updates: Count = 10_000
    batch_size: Count = 1024
    """Images per update; all of one update come with the same number of questions, drawn from 1 ... ``max_turns``."""
    max_turns: Count = 3
    lr: float = 1.0e-3
    weight_decay: float = 0.05
    warmup_updates: Count = 500
    clip_grad_norm: float = 1.0
    held_out_images: Count = 200
    evaluate_every_updates: Count = 1000
    checkpoint_every_updates: Count = 1000


class PretrainRecipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    seed: int = 0
    data: Data = Data()
    model: small.SmallVLM = small.SmallVLM()
    training: Training = Training()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    resources: Resources = Resources()


class TokenTurn(NamedTuple):
    """One question and answer as token ids; ``first`` is the prompt when it opens the conversation, image included."""

    first: list[int]
    later: list[int]
    answer: list[int]


class Corpus:
    """All images as one uint8 tensor [N, 3, H, W] on ``device`` and all turns as token ids."""

    def __init__(self, rows: Any, encoder: Encoder, device: str):
        self.images = torch.stack([_pixels(row["image"]) for row in rows]).to(device)
        self.background, self.room = _frame_facts(self.images)
        self.known: dict[Turn, TokenTurn] = {}
        blank = rows[0]["image"]
        self.turns = [[self._tokenise(turn, encoder, blank) for turn in turns_of(row)] for row in rows]

    def _tokenise(self, turn: Turn, encoder: Encoder, image: Any) -> TokenTurn:
        if turn not in self.known:
            alone = encoder.encode("turn", image, [turn])
            pair = encoder.encode("pair", image, [turn, turn]).input_ids[len(alone.input_ids) :].tolist()
            size = int((alone.labels != IGNORE).sum())
            self.known[turn] = TokenTurn(alone.input_ids[:-size].tolist(), pair[:-size], pair[-size:])
        return self.known[turn]


def pretrain(recipe: PretrainRecipe, data: DataManifest, folder: Path, reporter: Reporter, device: str) -> Checkpoint:
    """Train the small VLM and write it, in fp16, to ``folder/model``; continues from a snapshot in ``folder``."""
    settings = recipe.training
    torch.set_float32_matmul_precision("high")
    rows = open_dataset(data)
    texts = [text for row in rows.remove_columns("image") for turn in turns_of(row) for text in turn]
    tokenizer = small.build_tokenizer(texts)
    processor = small.build_processor(recipe.model, tokenizer)
    model = small.build_model(recipe.model, tokenizer, seed=recipe.seed).to(device)
    corpus = Corpus(rows, Encoder(processor), device)
    order = np.random.default_rng(recipe.seed).permutation(len(rows))
    held_out, training = order[: settings.held_out_images], order[settings.held_out_images :]
    optimizer = _optimizer(model, settings)
    snapshots = Snapshots(folder / "snapshots", recipe.model_dump(mode="json", include={"seed", "model", "training"}))
    done = _restore(snapshots, model, optimizer)
    batches = _loader(corpus.turns, training, settings, recipe.seed, done, tokenizer.pad_token_id)
    progress = Progress(settings.updates, "pretrain", "update", reporter, initial=done)
    with progress:
        for update, (chosen, ids, labels) in enumerate(batches, start=done + 1):
            lr = _set_lr(optimizer, settings, update)
            pixels = augment(corpus, chosen, torch.Generator().manual_seed(recipe.seed * 1_000_003 + update))
            loss = _loss(model, pixels, ids.to(device), labels.to(device))
            norm = _step(model, optimizer, loss, settings.clip_grad_norm)
            if update % 50 == 0:
                values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
                reporter.metrics(values, update)
                progress.update(50, **values)
            if update % settings.evaluate_every_updates == 0 or update == settings.updates:
                reporter.metrics({"held_out_accuracy": _accuracy(model, corpus, held_out, device)}, update)
            if update % settings.checkpoint_every_updates == 0:
                snapshots.save(update, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model = model.eval().to("cpu", torch.float16)
    hybrid.save(model, processor, folder / "model", {"recipe": recipe.model_dump(mode="json")})
    count = sum(parameter.numel() for parameter in model.parameters())
    return Checkpoint(
        uri=str(folder / "model"), label="teacher", updates=settings.updates, parameters=count, trained_parameters=count
    )


def augment(corpus: Corpus, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted and mirrored images ``chosen`` [B] of ``corpus`` as the processor would scale them: fp32 [B, 3, H, W].

    The shift keeps whatever differs from the background inside the frame; uncovered pixels take the background's colour.
    """
    chosen = chosen.to(corpus.images.device)
    images, (up, down, left, right) = corpus.images[chosen], corpus.room[chosen].unbind(1)
    draw = torch.rand(3, len(chosen), generator=generator).to(images.device)
    rows = _source_index(images.shape[2], -up, down, draw[0])
    columns = _source_index(images.shape[3], -left, right, draw[1])
    height, width = images.shape[2:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    sample = torch.arange(len(chosen), device=images.device)[:, None, None]
    shifted = images[sample, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    shifted = torch.where(inside[..., None], shifted, corpus.background[chosen][:, None, None]).permute(0, 3, 1, 2)
    mirrored = torch.where((draw[2] < 0.5)[:, None, None, None], shifted.flip(3), shifted)
    return _scaled(mirrored)


def _source_index(size: int, low: Tensor, high: Tensor, draw: Tensor) -> Tensor:
    """int64 [B, size]: where each row (or column) is read from when the content moves by a draw from [low, high]."""
    shift = (low + draw * (high - low + 1)).floor().long()
    return torch.arange(size, device=shift.device)[None] - shift[:, None]


def _frame_facts(images: Tensor) -> tuple[Tensor, Tensor]:
    """Background colour uint8 [N, 3] (the median) and how far content can move up, down, left, right: int64 [N, 4]."""
    background = images.flatten(2).median(dim=2).values
    content = ((images.int() - background.int()[:, :, None, None]).abs() > 8).any(dim=1)
    room = []
    for used in (content.any(dim=2), content.any(dim=1)):
        before = used.int().argmax(dim=1)
        after = used.flip(1).int().argmax(dim=1)
        empty = ~used.any(dim=1)
        room += [before.masked_fill(empty, 0), after.masked_fill(empty, 0)]
    return background, torch.stack(room, dim=1)


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


class _Conversations(torch.utils.data.Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Item ``u`` is the whole batch of update ``u``: images int64 [B], input_ids and labels int64 [B, L]."""

    def __init__(self, turns: list[list[TokenTurn]], images: np.ndarray, settings: Training, seed: int, pad: int):
        self.turns, self.images, self.settings, self.seed, self.pad = turns, images, settings, seed, pad

    def __len__(self) -> int:
        return self.settings.updates

    def __getitem__(self, update: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = np.random.default_rng((self.seed, update))
        chosen = draw.choice(self.images, self.settings.batch_size, replace=len(self.images) < self.settings.batch_size)
        turns = int(draw.integers(1, self.settings.max_turns + 1))
        rows = [self._conversation(int(image), turns, draw) for image in chosen]
        length = max(len(ids) for ids, _ in rows)
        ids = [tokens + [self.pad] * (length - len(tokens)) for tokens, _ in rows]
        labels = [marks + [IGNORE] * (length - len(marks)) for _, marks in rows]
        return torch.from_numpy(chosen), torch.tensor(ids), torch.tensor(labels)

    def _conversation(self, image: int, count: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:
        turns = self.turns[image]
        ids: list[int] = []
        labels: list[int] = []
        for number in draw.permutation(len(turns))[:count]:
            turn = turns[number]
            prompt = turn.later if ids else turn.first
            ids += prompt + turn.answer
            labels += [IGNORE] * len(prompt) + turn.answer
        return ids, labels


def _loader(
    turns: list[list[TokenTurn]], images: np.ndarray, settings: Training, seed: int, done: int, pad: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    dataset = _Conversations(turns, images, settings, seed, pad)
    workers = 4 if torch.cuda.is_available() else 0
    return iter(
        torch.utils.data.DataLoader(
            dataset, batch_size=None, sampler=range(done, settings.updates), num_workers=workers
        )
    )


def _loss(model: torch.nn.Module, pixels: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens. Right padding needs no mask: causal positions never look at it."""
    logits = model(input_ids=ids, pixel_values=pixels).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def _optimizer(model: torch.nn.Module, settings: Training) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _set_lr(optimizer: torch.optim.AdamW, settings: Training, update: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak."""
    left = max(0.0, (update - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates))
    lr = settings.lr * min(update / settings.warmup_updates, 0.01 + 0.99 * (1 + math.cos(math.pi * left)) / 2)
    for group in optimizer.param_groups:
        group["lr"] = lr
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
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return update


@torch.no_grad()
def _accuracy(model: torch.nn.Module, corpus: Corpus, images: np.ndarray, device: str) -> float:
    """Share of held-out questions, each asked alone, whose every answer token is the most likely one."""
    right = total = 0
    for image in images:
        turns = corpus.turns[image]
        rows = [torch.tensor(turn.first + turn.answer) for turn in turns]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        pixels = _scaled(corpus.images[image : image + 1]).expand(len(turns), -1, -1, -1)
        best = model(input_ids=ids, pixel_values=pixels).logits.argmax(dim=-1).cpu()
        for row, turn in zip(best, turns, strict=True):
            start = len(turn.first) - 1
            right += row[start : start + len(turn.answer)].tolist() == turn.answer
            total += 1
    return right / total


def write_card(folder: Path, recipe: PretrainRecipe, teacher: Checkpoint, result: EvalResult) -> None:
    """The model card, README.md in the model's ``folder``: what it is, the command that makes it, its scores."""
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(result.metrics.items()))
    write_bytes(
        str(folder / "README.md"),
        CARD.format(
            parameters=f"{teacher.parameters:,}",
            updates=f"{teacher.updates:,}",
            name=recipe.name,
            questions=f"{result.num_questions:,}",
            scores=scores,
            torch=torch.__version__,
        ).encode(),
    )


CARD = """# Small easy-VQA teacher

A LLaVA-architecture vision-language model (SigLIP-style tower, 2-layer MLP connector, 8-layer Phi decoder) with
{parameters} parameters, stored in fp16. It answers questions about the colour and shape of one drawn figure, and is the
pre-trained model that matvlm's default recipe starts from. It knows nothing else.

Made by `python flows/teacher_flow.py --config recipe flows/recipes/{name}.yaml run` ({updates} updates, torch {torch})
from the training split of the `easy-vqa` package (MIT licence). Scores on that package's test split, {questions}
questions about images never trained on:

| metric | value |
| --- | --- |
{scores}
"""
