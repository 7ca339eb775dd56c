"""Several samples in one row of a batch, so that little of it is padding.

Of such a row the model is told ``position_ids``, which start again at 0 with every sample: from these transformers
makes masks that keep samples apart. The Mamba-2 layers are told ``seq_idx``, which of a row's samples a token is of.
``matvlm.models.packing.check`` says whether a model heeds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matvlm.data.encoding import IGNORE, Batch, Encoder, Sample


def pack(samples: Sequence[Sample], room: int) -> list[list[Sample]]:
    """``samples`` in rows of at most ``room`` tokens: the longest first, each into the first row that has room for it.

    Of equally long ones the earlier comes first, so the same samples make the same rows.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows: list[list[Sample]] = []
    left: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        if length > room:
            raise ValueError(f"sample {sample.id}: its {length} tokens do not fit into a row of {room}")
        row = next((index for index, free in enumerate(left) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(sample)
        left[row] -= length
    return rows


def collate(rows: Sequence[Sequence[Sample]], encoder: Encoder) -> Batch:
    """A batch with a row for each of ``rows``, as long as the longest, for a model without a cache.

    Kept positions, their labels, ``ids`` and image inputs are in the order of the samples in the rows. A sample's first
    token is no label, as nothing stands before it to predict it from. Padding ends a row as a sample of its own.
    ``inputs`` holds ``position_ids`` int64 and ``seq_idx`` int32, both [B, L], and no attention mask.
    """
    samples = [sample for row in rows for sample in row]
    images = {name: torch.cat([s.image_inputs[name] for s in samples]) for name in samples[0].image_inputs}
    lengths = [[len(sample.input_ids) for sample in row] for row in rows]
    longest = max(map(sum, lengths))
    spans = [[*row, longest - sum(row)] for row in lengths]
    inputs = {
        "input_ids": _padded([[s.input_ids for s in row] for row in rows], encoder.pad),
        "position_ids": torch.stack([torch.cat([torch.arange(span) for span in row]) for row in spans]),
        "seq_idx": torch.stack([_numbers(row) for row in spans]),
    }
    real = torch.arange(longest) < torch.tensor([sum(row) for row in lengths])[:, None]
    labels = _padded([[_after_the_first(s.labels) for s in row] for row in rows], IGNORE)
    kept = _padded([[encoder.collate([replace(s, image_inputs={})]).kept[0] for s in row] for row in rows], False)
    return Batch([s.id for s in samples], inputs | images, labels, kept, real)


def _padded(rows: Sequence[Sequence[Tensor]], value: int | bool) -> Tensor:
    """The tensors [L] of each row one after another, and ``value`` to the end of the longest row: [B, L]."""
    return pad_sequence([torch.cat(list(row)) for row in rows], batch_first=True, padding_value=value)


def _numbers(spans: Sequence[int]) -> Tensor:
    """0, 1, 2, ... for as many tokens each as ``spans`` says, int32."""
    return torch.arange(len(spans), dtype=torch.int32).repeat_interleave(torch.tensor(spans))


def _after_the_first(labels: Tensor) -> Tensor:
    return torch.cat([torch.full_like(labels[:1], IGNORE), labels[1:]])
