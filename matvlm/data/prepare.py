"""``prepare_data``: a source -> a checked Arrow data set on disk, with what was skipped and why.

The folder holds ``arrow`` (``datasets.save_to_disk``) and ``matvlm_manifest.json`` (the manifest, and the settings that
the data set was made with). It appears whole or not at all. Images that a source has in its own files (easy-VQA,
parquet) are copied into it; those in folders, archives and S3, which may be hundreds of gigabytes, stay where they are,
and the data set says where that is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from matvlm.artifacts import DataManifest
from matvlm.config import Data
from matvlm.data.encoding import Batch, Encoder, TemplateError, TooLong, Turn
from matvlm.data.images import decode, read_image
from matvlm.data.rows import TEXT_ONLY, BadSample, DataError, Entry, Row
from matvlm.data.sources import entries
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.storage import atomic_folder, local_copy, read_json, write_json

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

MANIFEST = "matvlm_manifest.json"
SHOWN_SKIPS = 5
"""Samples that are named in the log, of each reason."""
READERS = 8
"""Threads that read, decode and check samples."""


def prepare(
    data: Data, seed: int, folder: Path, reporter: Reporter | None = None, encoder: Encoder | None = None
) -> DataManifest:
    """Read, check and write the recipe's training data to ``folder``; a finished data set of the same settings is kept.

    Args:
        seed: decides which samples are drawn when ``data.max_samples`` is fewer than there are.
        encoder: of the teacher. With it, samples that it cannot encode (too long, say) are skipped and counted here
            instead of failing in a later stage.

    Raises:
        DataError: the source cannot be read, nothing is usable, more than ``data.max_bad_share`` of it is bad (samples
            without an image are skipped and counted, but not bad), or ``folder`` holds a data set that was made with
            other settings.
        TemplateError: the teacher's chat template cannot be used for training.
        StorageError: S3 cannot be reached, or the data set cannot be written; nothing is left in its place.
    """
    max_length = encoder.max_length if encoder else None
    made_with = {**data.model_dump(mode="json"), "seed": seed, "checked_for_max_length": max_length}
    if (folder / MANIFEST).exists():
        return _finished(folder, made_with)
    rows = _CheckedRows(_choose(entries(data), data.max_samples, seed), data.max_turns, reporter, encoder)
    with atomic_folder(folder) as unfinished:
        dataset = _to_dataset(rows, unfinished / "cache")
        _refuse_bad(rows, len(dataset), data)
        dataset.save_to_disk(str(unfinished / "arrow"))
        manifest = DataManifest(
            uri=str(folder),
            num_samples=len(dataset),
            num_skipped=sum(rows.skipped.values()),
            skipped=dict(rows.skipped),
            fingerprint=rows.digest.hexdigest(),
        )
        del dataset
        shutil.rmtree(unfinished / "cache")
        write_json(unfinished / MANIFEST, {"manifest": manifest.model_dump(mode="json"), "made_with": made_with})
    return manifest


def open_dataset(manifest: DataManifest) -> Any:
    """The prepared ``datasets.Dataset``: columns ``id``, ``image`` (read and decoded to PIL RGB on access), ``turns``.

    Raises:
        DataError: the folder is gone or damaged. Accessing an image raises ``BadSample`` if it is not there any more.
    """
    import datasets

    from matvlm.data.placed import PlacedImage

    try:
        dataset = datasets.load_from_disk(str(local_copy(manifest.uri) / "arrow"))
        if len(dataset) != manifest.num_samples:
            raise ValueError(f"{len(dataset)} of {manifest.num_samples} samples are left")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{manifest.uri}: cannot open the prepared data ({error}); remove this folder and run prepare_data again"
        ) from None
    return dataset.cast_column("image", PlacedImage())


def turns_of(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of one data set row."""
    return [Turn(turn["question"], turn["answer"]) for turn in row["turns"]]


def encode_rows(encoder: Encoder, rows: Iterable[Mapping[str, Any]]) -> Batch:
    """Data set rows as one batch, in their order."""
    return encoder.collate([encoder.encode(row["id"], row["image"], turns_of(row)) for row in rows])


def _finished(folder: Path, made_with: dict[str, Any]) -> DataManifest:
    record = read_json(folder / MANIFEST)
    try:
        manifest = DataManifest.model_validate({**record["manifest"], "uri": str(folder)})
        found = dict(record["made_with"])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{folder / MANIFEST}: not a manifest of prepared data; remove the folder") from None
    for field in sorted(found.keys() | made_with.keys()):
        if found.get(field) != made_with.get(field):
            raise DataError(
                f"{folder}: was prepared with {field}={found.get(field)!r} and this run has {made_with.get(field)!r}; "
                "remove the folder to make it anew, or use another one"
            )
    return manifest


Checked = list[Row | BadSample]
"""What became of a sample: its parts of at most ``max_turns`` turns, each a row or the reason why it is none."""


class _CheckedRows:
    """Yields the usable rows of ``chosen`` and keeps count of the others; ``digest`` grows with what was yielded."""

    def __init__(self, chosen: list[Entry], max_turns: int | None, reporter: Reporter | None, encoder: Encoder | None):
        self.chosen, self.max_turns, self.reporter, self.encoder = chosen, max_turns, reporter, encoder
        self.skipped: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Row]:
        with Progress(len(self.chosen), "prepare_data", "sample", self.reporter) as progress:
            for parts, image_hash in _ahead(self._check, self.chosen):
                for part in parts:
                    if isinstance(part, BadSample):
                        self._skip(part)
                        continue
                    self.digest.update(json.dumps([part["id"], part["turns"]]).encode() + image_hash)
                    yield part
                progress.update(1, skipped=sum(self.skipped.values()))

    def _check(self, entry: Entry) -> tuple[Checked, bytes]:
        """The parts of a sample, where a bad one does not touch the others, and the hash of its image."""
        try:
            row = entry()
            content = read_image(row["image"], row["id"])
            image = decode(content, row["image"], row["id"])
        except BadSample as bad:
            return [bad], b""
        checked: Checked = []
        for part in _split(row, self.max_turns):
            try:
                self._check_encoding(part, image)
                checked.append(part)
            except BadSample as bad:
                checked.append(bad)
        return checked, hashlib.sha256(content).digest()

    def _check_encoding(self, row: Row, image: Image.Image) -> None:
        if self.encoder is None:
            return
        try:
            self.encoder.encode(row["id"], image, turns_of(row)[:1])  # later turns may be cut off
        except TemplateError:
            raise
        except TooLong as error:
            raise BadSample("too long", str(error)) from None
        except ValueError as error:  # an extreme aspect ratio, say
            raise BadSample("refused by the processor", f"{row['id']}: {error}") from None

    def _skip(self, bad: BadSample) -> None:
        self.skipped[bad.reason] += 1
        if self.skipped[bad.reason] <= SHOWN_SKIPS:
            log.warning("skipped: %s", bad)


def _ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map``, in order, but some items ahead in threads: reading waits for disk or network, decoding needs no GIL."""
    rest = iter(items)
    for first in islice(rest, 1):  # alone: what a tokenizer sets up at first use, it must not while others use it
        yield function(first)
    pool, pending = ThreadPoolExecutor(READERS), deque[Future[Result]]()
    try:
        for item in rest:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _split(row: Row, max_turns: int | None) -> list[Row]:
    """``row``, or several rows of at most ``max_turns`` turns about the same image."""
    turns = row["turns"]
    if max_turns is None or len(turns) <= max_turns:
        return [row]
    parts = [turns[start : start + max_turns] for start in range(0, len(turns), max_turns)]
    return [{"id": f"{row['id']}.{n}", "image": row["image"], "turns": part} for n, part in enumerate(parts)]


def _choose(source: list[Entry], max_samples: int | None, seed: int) -> list[Entry]:
    if max_samples is None or max_samples >= len(source):
        return source
    kept = sorted(random.Random(seed).sample(range(len(source)), max_samples))
    return [source[number] for number in kept]


def _to_dataset(rows: _CheckedRows, cache: Path) -> Any:
    import datasets
    from datasets.arrow_writer import ArrowWriter

    datasets.disable_progress_bars()
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": image,  # no Image feature: to measure it ``save_to_disk`` would open every path
            "turns": datasets.List({"question": datasets.Value("string"), "answer": datasets.Value("string")}),
        }
    )
    cache.mkdir()
    file = cache / "rows.arrow"
    with ArrowWriter(path=str(file), features=features) as writer:
        for row in rows:
            writer.write(features.encode_example(row))
        writer.finalize()
    return datasets.Dataset.from_file(str(file))


def _refuse_bad(rows: _CheckedRows, usable: int, data: Data) -> None:
    source = data.path or data.source
    if not usable:
        reasons = _listed(rows.skipped) or "it is empty"
        raise DataError(f"{source}: no usable sample among {sum(rows.skipped.values())} ({reasons})")
    bad = Counter({reason: count for reason, count in rows.skipped.items() if reason != TEXT_ONLY})
    if bad.total() > data.max_bad_share * (usable + bad.total()):
        raise DataError(
            f"{source}: {bad.total()} of {usable + bad.total()} samples are unusable ({_listed(bad)}), more than "
            f"data.max_bad_share={data.max_bad_share}; mend the data or raise the share"
        )


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
