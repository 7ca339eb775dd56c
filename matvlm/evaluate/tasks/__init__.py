"""Benchmarks as lm-eval tasks: each a folder with YAML and small pure functions, that need nothing else from here.

``lm_eval --include_path FOLDER --tasks pope --metadata '{"data_root": "POPE"}'`` runs one by lm-eval alone, ``build``
makes the same tasks here. In their metadata ``score`` is the metric that stands for the task, absent where only a
server can score it or less is better, ``scale`` the factor to the scale of papers, and ``group`` the column of what is
scored together.
Metadata of the user: ``data_root``, a folder with the data set as on the hub (parquet, or as ``save_to_disk`` writes
it) or with the benchmark's own files, local or ``s3://``, or a mapping from task to such; ``hub_org``, where the hub is
asked instead; ``max_bad_share``.
"""

from __future__ import annotations

import io
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matvlm.evaluate.tasks import submissions

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*/*.yaml")))
HUB_ORG = "lmms-lab"
CARD_PIXELS = 512
"""The longer side, at most, of an image that ``png`` had to encode."""

SUBMISSIONS: Mapping[str, Callable[[Sequence[Mapping[str, Any]], Path], Path]] = {
    "mmbench_en_dev": submissions.mmbench,
    "mmbench_en_test": submissions.mmbench,
    "mmvet": submissions.mmvet,
    "vqav2_testdev": submissions.vqav2,
    "vqav2_val": submissions.vqav2,
}
"""Writes the file to upload for a task into a folder, from its documents with their ``answer``."""


def build(names: Sequence[str], data_root: Mapping[str, str] | None = None, hub_org: str = HUB_ORG) -> dict[str, Any]:
    """The lm-eval tasks ``names``, ready for ``lm_eval.evaluator.evaluate``.

    ``task.config.metadata["data"]`` says where the documents are from: source, how many questions, which rows were left
    out and why, and a hash of all that the documents say.

    Args:
        data_root: task -> the folder with its data, local or ``s3://``; the hub is asked for others.
        hub_org: the organisation on the hub whose data sets are meant.

    Raises:
        ValueError: there is no such task, or its data cannot be used; the message says what and where.
        StorageError: S3 cannot be reached.
    """
    from lm_eval.tasks import TaskManager

    if unknown := sorted(set(names).difference(NAMES)):
        raise ValueError(f"unknown task {unknown[0]!r}; known are {', '.join(NAMES)}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every metadata, and metric of some questions
    metadata: Any = {"data_root": dict(data_root or {}), "hub_org": hub_org}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    tasks = dict(manager.load(list(names))["tasks"])
    for task in tasks.values():
        task.config.metadata["data"] = json.loads(task.eval_docs.info.description or "{}")
    return {name: tasks[name] for name in names}


def evenly_spaced(task: Any, limit: int) -> list[int]:
    """The numbers of about ``limit`` documents, evenly spaced and in order, in whole groups.

    A group is what is scored together: MME's two questions about an image, the orders of an MMBench question.
    """
    groups = defaultdict(list)
    grouped = task.config.metadata.get("group")
    for number, key in enumerate(task.eval_docs[grouped] if grouped else range(len(task.eval_docs))):
        groups[key].append(number)
    every = list(groups.values())
    count = max(1, min(len(every), limit * len(every) // max(1, len(task.eval_docs))))
    return sorted(number for each in range(count) for number in every[each * len(every) // count])


def png(task: Any, doc: Mapping[str, Any]) -> bytes:
    """The first image of a document, encoded: as it is if it is a PNG, else made a PNG of card size.

    Raises:
        ValueError: the image cannot be read.
    """
    image = task.doc_to_image(doc)[0]
    content: bytes = image.encoded()
    if content.startswith(b"\x89PNG"):
        return content
    small = image.copy()
    small.thumbnail((CARD_PIXELS, CARD_PIXELS))
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()
