"""``prepare_data``: a source -> a checked Arrow data set on disk, with what was skipped and why.

The folder holds ``arrow`` (``datasets.save_to_disk``) and ``matvlm_manifest.json`` (the manifest, and the settings that
the data set was made with). It appears whole or not at all. Images of the easy-VQA package are copied into it; those
of a LLaVA-format file, which may be hundreds of gigabytes, stay where they are and are read from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from matvlm.artifacts import DataManifest
from matvlm.config import Data
from matvlm.data.encoding import Batch, Encoder, TemplateError, TooLong, Turn
from matvlm.data.sources import BadSample, DataError, Entry, Row, entries, read_image
from matvlm.progress import Progress
from matvlm.reporting import Reporter
from matvlm.storage import atomic_folder, read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "matvlm_manifest.json"
SHOWN_SKIPS = 5


def prepare(
    data: Data, seed: int, folder: Path, reporter: Reporter | None = None, encoder: Encoder | None = None
) -> DataManifest:
    """Read, check and write the recipe's training data to ``folder``; a finished data set of the same settings is kept.

    Args:
        seed: decides which samples are drawn when ``data.max_samples`` is fewer than there are.
        encoder: of the teacher. With it, samples that it cannot encode (too long, say) are skipped and counted here
            instead of failing in a later stage.

    Raises:
        DataError: the source cannot be read, nothing is usable, more than ``data.max_bad_share`` of it is bad, or
            ``folder`` holds a data set that was made with other settings.
        TemplateError: the teacher's chat template cannot be used for training.
        StorageError: the data set cannot be written; nothing is left in its place.
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
    """The prepared ``datasets.Dataset``: columns ``id``, ``image`` (decoded to PIL RGB on access) and ``turns``.

    Raises:
        DataError: the folder is gone or damaged.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(Path(manifest.uri) / "arrow"))
        if len(dataset) != manifest.num_samples:
            raise ValueError(f"{len(dataset)} of {manifest.num_samples} samples are left")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{manifest.uri}: cannot open the prepared data ({error}); remove this folder and run prepare_data again"
        ) from None
    return dataset


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


class _CheckedRows:
    """Yields the usable rows of ``chosen`` and keeps count of the others; ``digest`` grows with what was yielded."""

    def __init__(self, chosen: list[Entry], max_turns: int | None, reporter: Reporter | None, encoder: Encoder | None):
        self.chosen, self.max_turns, self.reporter, self.encoder = chosen, max_turns, reporter, encoder
        self.skipped: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Row]:
        with Progress(len(self.chosen), "prepare_data", "sample", self.reporter) as progress:
            for entry in self.chosen:
                yield from self._usable(entry)
                progress.update(1, skipped=sum(self.skipped.values()))

    def _usable(self, entry: Entry) -> Iterator[Row]:
        """The row of ``entry`` in parts of at most ``max_turns`` turns; a bad part is skipped, the others stay."""
        try:
            row = entry()
            content = row["image"]["bytes"] or read_image(row["image"]["path"] or "", row["id"])
            image = _decode(row, content)
        except BadSample as bad:
            self._skip(bad)
            return
        image_hash = hashlib.sha256(content).digest()
        for part in _split(row, self.max_turns):
            try:
                self._check_encoding(part, image)
            except BadSample as bad:
                self._skip(bad)
                continue
            self.digest.update(json.dumps([part["id"], part["turns"]]).encode() + image_hash)
            yield part

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
        if sum(self.skipped.values()) <= SHOWN_SKIPS:
            log.warning("skipped: %s", bad)


def _decode(row: Row, content: bytes) -> Image.Image:
    """The image exactly as readers of the data set will get it; what decodes here decodes there."""
    import datasets

    try:
        image: Image.Image = datasets.Image(mode="RGB").decode_example({"bytes": content, "path": None})
    except Exception as error:  # Pillow has no common error: OSError, SyntaxError, struct.error, ...
        where = row["image"]["path"] or "its image"
        raise BadSample("broken image", f"{row['id']}: {where}: {error}") from None
    return image


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
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(mode="RGB"),
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
    bad = sum(rows.skipped.values())
    source, reasons = data.path or data.source, ", ".join(f"{n} {reason}" for reason, n in rows.skipped.most_common())
    if not usable:
        raise DataError(f"{source}: no usable sample among {bad} ({reasons or 'it is empty'})")
    if bad > data.max_bad_share * (usable + bad):
        raise DataError(
            f"{source}: {bad} of {usable + bad} samples are unusable ({reasons}), more than "
            f"data.max_bad_share={data.max_bad_share}; mend the data or raise the share"
        )
