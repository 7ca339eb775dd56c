"""One task of an evaluation, from its questions to its files, in one process or in several that share the questions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvlm import __version__
from matvlm.config import Evaluate
from matvlm.evaluate.answers import Answers
from matvlm.evaluate.results import RESULTS, SAMPLES, EvaluationError, Row, to_lines
from matvlm.evaluate.scores import PARTS_SEED, Sample, metrics_of, row_of, score_of
from matvlm.storage import exists, read_json, remove, write_bytes, write_json

if TYPE_CHECKING:
    from matvlm.evaluate.harness import VLM

UNREADABLE_SHARE = 0.01
"""With more questions than that whose images cannot be read, a task has failed."""


@dataclass(frozen=True)
class TaskRun:
    """The evaluation of the task ``name`` into the folder ``out``.

    ``model`` is the hash of the model that ``vlm(answers=...)`` is lm-eval's view of. Answers in ``out`` are used again
    if that model gave them to the same questions, in this version of the task and of the libraries.
    """

    name: str
    settings: Evaluate
    limit: int | None
    out: Path
    model: str
    vlm: Callable[..., VLM]

    def build(self) -> Any:
        """The lm-eval task with its data.

        Raises:
            ValueError, OSError: it cannot use its data; the message says what is wrong with them.
        """
        from matvlm.evaluate import tasks

        return tasks.build([self.name], self.settings.data, self.settings.hub_org)[self.name]

    def run(self, task: Any, rank: int = 0) -> dict[str, Any] | None:
        """Write ``samples.jsonl`` and ``results.json``; returns what is in the latter, or None if ``rank`` is not 0.

        Raises:
            EvaluationError: too many images cannot be read.
            StorageError: ``out`` cannot be written.
        """
        from lm_eval import evaluator

        from matvlm.evaluate import tasks

        identity = {"task": self.name, "version": task.VERSION, "model": self.model, "limit": self.limit, **versions()}
        if rank == 0 and exists(self.out / RESULTS) and read_json(self.out / RESULTS).get("identity") != identity:
            remove(self.out / RESULTS)
        vlm = self.vlm(answers=Answers(self.out, identity, rank))
        seeds = _seed_as_lm_eval_does()
        chosen = {self.name: tasks.evenly_spaced(task, self.limit)} if self.limit else None
        with _images_left_alone():
            loaded = {"tasks": {self.name: task}, "groups": {}}
            results = evaluator.evaluate(vlm, loaded, samples=chosen, bootstrap_iters=0)
        unreadable = {id: reason for each in vlm.world.gather(vlm.unreadable) for id, reason in each.items()}
        if results is None:
            return None
        samples = sorted(results["samples"][self.name], key=lambda sample: sample["doc_id"])
        _check_readable(unreadable, len(samples))
        facts = {
            "identity": identity,
            "settings": {"batch_size": vlm.batch_size, "processes": vlm.world.size, "device": str(vlm.device)},
            "seeds": seeds,
            "seconds": vlm.answers.seconds if vlm.answers else 0.0,
            "unreadable": unreadable,
            "metrics": metrics_of(task, samples),
        }
        return self._write(task, samples, facts)

    def _write(self, task: Any, samples: list[Sample], facts: dict[str, Any]) -> dict[str, Any]:
        score = score_of(task, facts["metrics"], samples)
        rows = [row_of(task, self.name, sample) for sample in samples]
        origin = {"root": self.settings.data.get(self.name), "hub_org": self.settings.hub_org}
        record = {
            **facts,
            "score": score and score.model_dump(mode="json"),
            "questions": {"asked": len(samples), "of": len(task.eval_docs)},
            "choice": f"{self.limit}, evenly spaced over the split" if self.limit else "all",
            "data": {**origin, **(task.config.metadata.get("data") or {}), "sha256": _data_hash(samples)},
            "generation": task.config.generation_kwargs,
            "submission": _submission(self.name, samples, rows, self.out),
        }
        write_bytes(self.out / SAMPLES, to_lines(rows))
        write_json(self.out / RESULTS, record)
        return record


def versions() -> dict[str, str]:
    """Of what an answer or a score may depend on."""
    return {"matvlm": __version__, **{name: version(name) for name in ("lm_eval", "transformers", "torch")}}


def _seed_as_lm_eval_does() -> dict[str, int]:
    """For tasks that draw, such as MMMU for an answer that cannot be read; so none depends on those before it."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    seeds = {"random": DEFAULT_RANDOM_SEED, "numpy": DEFAULT_OTHER_SEED, "torch": DEFAULT_OTHER_SEED}
    return seeds | {"standard_error": PARTS_SEED}


@contextmanager
def _images_left_alone() -> Iterator[None]:
    """Without lm-eval's pass over its records, which puts hashes in place of images, as the harness has done, and makes
    plain tuples of what aggregates know by name."""
    from lm_eval import evaluator

    before, evaluator.LMEVAL_HASHMM = evaluator.LMEVAL_HASHMM, False
    try:
        yield
    finally:
        evaluator.LMEVAL_HASHMM = before


def _check_readable(unreadable: dict[str, str], total: int) -> None:
    if len(unreadable) > UNREADABLE_SHARE * total:
        id, reason = next(iter(unreadable.items()))
        raise EvaluationError(
            f"the images of {len(unreadable)} of {total} questions cannot be read, more than {UNREADABLE_SHARE:.0%}: "
            f"{id}: {reason}; mend the data"
        )


def _data_hash(samples: Sequence[Sample]) -> str:
    """sha256 (hex) over all that was asked and expected, down to the images."""
    digest = sha256()
    for sample in samples:
        said = {name: value for name, value in sample["doc"].items() if name not in ("images", "image")}
        digest.update(json.dumps([said, sample["arguments"], sample["target"]], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _submission(name: str, samples: Sequence[Sample], rows: Sequence[Row], out: Path) -> str | None:
    """The file for a benchmark's own server, for the tasks that have such."""
    from matvlm.evaluate import tasks

    write = tasks.SUBMISSIONS.get(name)
    answers = [{**sample["doc"], "answer": row["answer"]} for sample, row in zip(samples, rows, strict=True)]
    return str(write(answers, out)) if write else None
