"""Encoded samples while training: read, decoded and tokenised in worker processes, in the order that is asked for.

Workers come from a fork server, a process that has imported the libraries and nothing else. Forking the trainer itself
would copy whatever locks its threads hold at that moment (MLflow's, boto3's, NCCL's, the tokenizer's) and its CUDA
state; spawning would import everything once a worker, which takes seconds. A script that loads with workers needs the
usual ``if __name__ == "__main__"``: they import it.

Token ids are not stored with the data: tokenising takes little beside decoding and scaling an image, and an encoder
remembers it while its process lives.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from matvlm.data.encoding import Encoder, Sample, TemplateError
from matvlm.data.images import decode, name_of, read_image
from matvlm.data.prepare import turns_of
from matvlm.data.rows import BadSample


class LoadError(RuntimeError):
    """Samples cannot be loaded, for a reason that is no single sample's own; the message names what it happened at."""


class Loaded(NamedTuple):
    """The samples of one row list, in its order, without those in ``bad``: id -> why (its file is gone, say)."""

    samples: list[Sample]
    bad: dict[str, str]


def batches(
    dataset: Any, encoder: Encoder, row_lists: Iterable[Sequence[int]], workers: int, prefetch: int = 2
) -> Iterator[Loaded]:
    """The samples of each of ``row_lists``, one after the other; the same whatever the number of workers.

    Args:
        dataset: of ``open_dataset``.
        row_lists: rows of ``dataset``; with workers, read ahead of what is yielded.
        workers: processes, each with one torch thread; 0 loads in this one.
        prefetch: row lists that each worker keeps ready.

    Raises:
        LoadError: S3 cannot be reached, a worker was killed, or another error that is not a bad sample's.
        TemplateError: the chat template cannot be used for training.
    """
    source = _Samples(dataset, encoder)
    if workers == 0:
        for rows in row_lists:
            yield _sorted([source[row] for row in rows])
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_imports_of(encoder.processor))
    loader = DataLoader(
        source,
        batch_sampler=row_lists,  # type: ignore[arg-type]  # any iterable does
        num_workers=workers,
        prefetch_factor=prefetch,
        collate_fn=_pack,
        multiprocessing_context=context,
        worker_init_fn=partial(_begin, dict(os.environ)),
        generator=torch.Generator(),  # else it draws from the global one, which a resumed run would notice
    )
    loaded = iter(loader)
    while (packed := _next(loaded)) is not None:
        yield _sorted(packed.unpack())


class BadRow(NamedTuple):
    id: str
    why: str


Outcome = Sample | BadRow | LoadError | TemplateError
"""Of one row. Errors travel as values: one that a worker raises would arrive as text with a traceback."""


class _Samples(Dataset[Outcome]):
    """Item ``row`` is that row of ``dataset``, encoded."""

    def __init__(self, dataset: Any, encoder: Encoder):
        import datasets

        self.rows = dataset.cast_column("image", datasets.Image(decode=False))
        self.encoder = encoder

    def __getitem__(self, number: int) -> Outcome:
        row = self.rows[number]
        try:
            image = decode(read_image(row["image"], row["id"]), row["image"], row["id"])
            return self.encoder.encode(row["id"], image, turns_of(row))
        except TemplateError as error:
            return error
        except BadSample as error:
            return BadRow(row["id"], str(error))
        except ValueError as error:  # too long, or what the processor refuses
            return BadRow(row["id"], f"refused by the processor: {name_of(row['image'])}: {error}")
        except Exception as error:
            return LoadError(f"sample {row['id']} ({name_of(row['image'])}): {type(error).__name__}: {error}")

    def __getstate__(self) -> dict[str, Any]:
        """An encoder's memory cannot be pickled: a worker makes its own."""
        return {"rows": self.rows, "processor": self.encoder.processor, "max_length": self.encoder.max_length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rows, self.encoder = state["rows"], Encoder(state["processor"], state["max_length"])


@dataclass
class _Packed:
    """Outcomes whose tensors are joined, by name, to one: each tensor sent between processes costs an open file."""

    outcomes: list[str | BadRow | LoadError | TemplateError]
    """The id stands for a sample."""
    joined: dict[str, Tensor]
    shapes: dict[str, list[torch.Size]]

    def unpack(self) -> list[Outcome]:
        sizes = {name: [shape.numel() for shape in shapes] for name, shapes in self.shapes.items()}
        parts = {
            name: zip(joined.split(sizes[name]), self.shapes[name], strict=True) for name, joined in self.joined.items()
        }
        samples = zip(*([part.view(shape) for part, shape in pairs] for pairs in parts.values()), strict=True)
        return [
            _sample(outcome, dict(zip(parts, next(samples), strict=True))) if isinstance(outcome, str) else outcome
            for outcome in self.outcomes
        ]


def _pack(outcomes: list[Outcome]) -> _Packed:
    named = [
        {"input_ids": sample.input_ids, "labels": sample.labels, **sample.image_inputs}
        for sample in outcomes
        if isinstance(sample, Sample)
    ]
    names = list(named[0]) if named else []
    return _Packed(
        [outcome.id if isinstance(outcome, Sample) else outcome for outcome in outcomes],
        {name: torch.cat([tensors[name].reshape(-1) for tensors in named]) for name in names},
        {name: [tensors[name].shape for tensors in named] for name in names},
    )


def _sample(id: str, tensors: dict[str, Tensor]) -> Sample:
    return Sample(id, tensors.pop("input_ids"), tensors.pop("labels"), tensors)


def _sorted(outcomes: list[Outcome]) -> Loaded:
    loaded = Loaded([], {})
    for outcome in outcomes:
        if isinstance(outcome, Sample):
            loaded.samples.append(outcome)
        elif isinstance(outcome, BadRow):
            loaded.bad[outcome.id] = outcome.why
        else:
            raise outcome
    return loaded


def _imports_of(processor: Any) -> list[str]:
    """What a fork server, if it starts now, imports once for all workers; for a processor that takes seconds."""
    parts = [
        getattr(processor, name, None) for name in getattr(processor, "attributes", ["image_processor", "tokenizer"])
    ]
    return [
        __name__,
        "matvlm.data.placed",
        *(type(part).__module__ for part in [processor, *parts] if part is not None),
    ]


def _next(loaded: Iterator[_Packed]) -> _Packed | None:
    try:
        return next(loaded, None)
    except (RuntimeError, EOFError, OSError) as error:  # all three, of a worker that was killed
        raise LoadError(
            f"loading ended in a worker: {error or 'it is gone'}; if memory or /dev/shm was short, give more or use "
            "fewer workers"
        ) from error


def _begin(environment: dict[str, str], worker: int) -> None:
    """Give this worker the trainer's environment, which the fork server knows as it was when that started.

    And let it end with the trainer, however that ends: torch's workers watch the fork server, and that lives as long as
    one of them does.
    """
    os.environ.clear()
    os.environ.update(environment)
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    Thread(target=_end_with, args=(trainer.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
