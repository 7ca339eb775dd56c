"""What the small teacher is trained on: shifted and mirrored images with a few of their questions, update by update.

N images of the data set, B images of a batch, H x W pixels, L tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from matvlm.data.encoding import IGNORE, Encoder, Turn
from matvlm.data.prepare import turns_of


class TokenTurn(NamedTuple):
    """One question and answer as token ids; ``first`` is the prompt when it opens the conversation, image included."""

    first: list[int]
    later: list[int]
    answer: list[int]


class Corpus:
    """All images of ``rows`` as one uint8 tensor [N, 3, H, W] on ``device`` and all turns as token ids.

    Raises:
        ValueError: an image is not ``size`` pixels wide and high.
    """

    def __init__(self, rows: Any, encoder: Encoder, size: int, device: str):
        self.images = torch.stack([_pixels(row, size) for row in rows]).to(device)
        self.background, self.room = _frame_facts(self.images)
        self.known: dict[Turn, TokenTurn] = {}
        blank = rows[0]["image"]
        self.turns = [[self._tokenise(turn, encoder, blank) for turn in turns_of(row)] for row in rows]

    def scaled(self, chosen: Tensor | slice) -> Tensor:
        """Images ``chosen`` as the processor would scale them: fp32 [B, 3, H, W]."""
        return _scaled(self.images[chosen])

    def _tokenise(self, turn: Turn, encoder: Encoder, image: Any) -> TokenTurn:
        if turn not in self.known:
            alone = encoder.encode("turn", image, [turn])
            pair = encoder.encode("pair", image, [turn, turn]).input_ids[len(alone.input_ids) :].tolist()
            size = int((alone.labels != IGNORE).sum())
            self.known[turn] = TokenTurn(alone.input_ids[:-size].tolist(), pair[:-size], pair[-size:])
        return self.known[turn]


class Conversations(torch.utils.data.Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Item ``u`` is the whole batch of update ``u``: images int64 [B], input_ids and labels int64 [B, L].

    B conversations, each about one of ``images`` and with the same number of turns, 1 ... ``max_turns``. All of it is a
    function of (seed, u), whoever asks for it, in whatever order.
    """

    def __init__(
        self, turns: list[list[TokenTurn]], images: np.ndarray, batch_size: int, max_turns: int, seed: int, pad: int
    ):
        self.turns, self.images, self.batch_size, self.max_turns = turns, images, batch_size, max_turns
        self.seed, self.pad = seed, pad

    def __getitem__(self, update: int) -> tuple[Tensor, Tensor, Tensor]:
        draw = np.random.default_rng((self.seed, update))
        chosen = draw.choice(self.images, self.batch_size, replace=len(self.images) < self.batch_size)
        turns = int(draw.integers(1, self.max_turns + 1))
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


def augment(corpus: Corpus, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted and mirrored images ``chosen`` [B] of ``corpus`` as the processor would scale them: fp32 [B, 3, H, W].

    The shift keeps whatever differs from the background inside; uncovered pixels take the background's colour.
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


def _pixels(row: Any, size: int) -> Tensor:
    if row["image"].size != (size, size):
        raise ValueError(f"image of {row['id']}: {row['image'].size} pixels, and model.image_size is {size}")
    return torch.from_numpy(np.array(row["image"])).permute(2, 0, 1)


def _scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0
