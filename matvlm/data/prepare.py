"""``prepare_data``: a source -> a checked Arrow data set on disk, with what was skipped and why."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matvlm.artifacts import DataManifest
from matvlm.config import Data
from matvlm.data.encoding import Turn
from matvlm.data.sources import BadSample, DataError, Entry, Row, entries
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.storage import atomic_folder, read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "matvlm_manifest.json"
SHOWN_SKIPS = 5


def prepare(data: Data, seed: int, folder: Path, reporter: Reporter | None = None) -> DataManifest:
    """Read, check and write the recipe's training data to ``folder``; a finished data set there is kept as it is.

    Raises:
        DataError: the source cannot be read, nothing is usable, or more than ``data.max_bad_share`` of it is bad.
    """
    if (folder / MANIFEST).exists():
        return DataManifest.model_validate(read_json(str(folder / MANIFEST)))
    chosen = _choose(entries(data), data.max_samples, seed)
    rows = _CheckedRows(chosen, data.max_turns, reporter)
    with atomic_folder(folder) as unfinished:
        dataset = _to_dataset(rows, unfinished / "cache")
        _refuse_bad_share(rows, data)
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
        write_json(str(unfinished / MANIFEST), manifest.model_dump(mode="json"))
    return manifest


def open_dataset(manifest: DataManifest) -> Any:
    """The prepared ``datasets.Dataset``: columns ``id``, ``image`` (decoded to PIL RGB on access) and ``turns``.

    Raises:
        DataError: the folder is gone or damaged.
    """
    import datasets

    try:
        return datasets.load_from_disk(str(Path(manifest.uri) / "arrow"))
    except (OSError, ValueError) as error:
        raise DataError(f"{manifest.uri}: cannot open the prepared data ({error}); run prepare_data again") from None


def turns_of(row: dict[str, Any]) -> list[Turn]:
    """The turns of one data set row."""
    return [Turn(turn["question"], turn["answer"]) for turn in row["turns"]]


class _CheckedRows:
    """Yields the usable rows of ``chosen`` and keeps count of the others."""

    def __init__(self, chosen: list[Entry], max_turns: int | None, reporter: Reporter | None):
        self.chosen, self.max_turns, self.reporter = chosen, max_turns, reporter
        self.skipped: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Row]:
        with Progress(len(self.chosen), "prepare_data", "sample", self.reporter) as progress:
            for entry in self.chosen:
                try:
                    row = entry()
                except BadSample as bad:
                    self._skip(bad)
                else:
                    for part in _split(row, self.max_turns):
                        self._digest(part)
                        yield part
                progress.update(1, skipped=sum(self.skipped.values()))

    def _skip(self, bad: BadSample) -> None:
        self.skipped[bad.reason] += 1
        if sum(self.skipped.values()) <= SHOWN_SKIPS:
            log.warning("skipped: %s", bad)

    def _digest(self, row: Row) -> None:
        image = row["image"]
        content = image["bytes"] or Path(image["path"] or "").read_bytes()
        self.digest.update(json.dumps([row["id"], row["turns"]]).encode())
        self.digest.update(hashlib.sha256(content).digest())


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

    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(mode="RGB"),
            "turns": datasets.List({"question": datasets.Value("string"), "answer": datasets.Value("string")}),
        }
    )
    from datasets.arrow_writer import ArrowWriter

    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "rows.arrow"
    with ArrowWriter(path=str(file), features=features) as writer:
        for row in rows:
            writer.write(features.encode_example(row))
        count, _ = writer.finalize()
    if not count:
        raise DataError(f"no usable sample among {len(rows.chosen)}: {dict(rows.skipped)}")
    return datasets.Dataset.from_file(str(file))


def _refuse_bad_share(rows: _CheckedRows, data: Data) -> None:
    bad = sum(rows.skipped.values())
    if bad > data.max_bad_share * len(rows.chosen):
        raise DataError(
            f"{data.path or data.source}: {bad} of {len(rows.chosen)} samples are unusable ({dict(rows.skipped)}), "
            f"more than data.max_bad_share={data.max_bad_share}; mend the data or raise the share"
        )
