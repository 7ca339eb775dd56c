"""Evaluation of a checkpoint through lm-eval, and the questions worth showing from two such evaluations."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matvlm.artifacts import Checkpoint, EvalResult
from matvlm.config import Evaluate
from matvlm.models import locate
from matvlm.reporting import Reporter
from matvlm.storage import read_bytes, write_bytes, write_json

SAMPLES, RESULTS = "samples.jsonl", "results.json"


class EvaluationError(ValueError):
    """An evaluation that cannot be run; the message names the checkpoint or task and what is wrong with it."""


class Task(NamedTuple):
    """One of our lm-eval tasks: ``build`` makes it, ``png`` gives the encoded image of an ``image_id``."""

    build: Callable[[], Any]
    png: Callable[[str], bytes]


@dataclass(frozen=True)
class ComparedSample:
    """One question as teacher and student answered it. ``png`` is the encoded image."""

    id: str
    question: str
    expected: str
    teacher_answer: str
    student_answer: str
    teacher_right: bool
    student_right: bool
    png: bytes


def evaluate(
    checkpoint: Checkpoint,
    settings: Evaluate,
    limit: int | None,
    out: Path,
    reporter: Reporter,
    device: str = "cpu",
) -> EvalResult:
    """Run the tasks of ``settings`` on ``checkpoint`` and write ``samples.jsonl`` and ``results.json`` into ``out``.

    With ``limit``, each task is reduced to that many questions, evenly spaced over its split, so that all checkpoints
    with the same limit answer the same questions. A line of ``samples.jsonl`` has task, id, image_id, question,
    expected, answer and right. Nothing is fetched from a network. ``reporter`` also gets questions_per_second.

    Raises:
        EvaluationError: a task is unknown, or the checkpoint cannot be opened or has no image processor.
        StorageError: ``out`` cannot be written.
    """
    from lm_eval import evaluator

    from matvlm.evaluate.harness import VLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every metric of one kind of question
    vlm = VLM(*_open(checkpoint, device), settings.batch_size, reporter, label=f"evaluate {checkpoint.label}")
    tasks = {name: _task(name).build() for name in settings.tasks}
    chosen = {name: evenly_spaced(len(task.eval_docs), limit) for name, task in tasks.items()} if limit else None
    started = time.monotonic()
    results = evaluator.evaluate(vlm, {"tasks": tasks, "groups": {}}, samples=chosen, bootstrap_iters=0)
    seconds = time.monotonic() - started

    rows = [_row(task, sample) for task, samples in results["samples"].items() for sample in samples]
    result = EvalResult(
        label=checkpoint.label,
        checkpoint_uri=checkpoint.uri,
        metrics=_metrics(results["results"]),
        num_questions=len(rows),
        seconds=seconds,
        samples_uri=str(out / SAMPLES),
    )
    write_bytes(out / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    coverage = {
        "choice": f"{limit} of each task, evenly spaced over its split" if limit else "all",
        "questions": {task: {"asked": n["effective"], "of": n["original"]} for task, n in results["n-samples"].items()},
    }
    write_json(out / RESULTS, {**result.model_dump(mode="json"), **coverage})
    reporter.metrics({**result.metrics, "questions_per_second": len(rows) / seconds})
    for name in (SAMPLES, RESULTS):
        reporter.artifact(out / name, "evaluation")
    return result


def evenly_spaced(total: int, limit: int) -> list[int]:
    """``limit`` different numbers below ``total``, in order and evenly spaced; all of them if there are fewer."""
    count = min(limit, total)
    return [number * total // count for number in range(count)]


def compare_samples(teacher_samples: str, student_samples: str, n: int, seed: int) -> list[ComparedSample]:
    """``n`` questions that both evaluations answered, half of them answered differently as far as there are such.

    Args:
        teacher_samples, student_samples: URIs of two ``samples.jsonl``.
        seed: decides which; the result is in the order of the evaluation.

    Raises:
        StorageError: a file is missing or cannot be read.
    """
    teacher, student = _read_rows(teacher_samples), _read_rows(student_samples)
    common = [key for key in teacher if key in student]
    differing = [key for key in common if teacher[key]["answer"] != student[key]["answer"]]
    agreeing = [key for key in common if teacher[key]["answer"] == student[key]["answer"]]
    draw = random.Random(seed)
    half = max(n - n // 2, n - len(agreeing))
    shown = draw.sample(differing, min(half, len(differing)))
    shown += draw.sample(agreeing, min(n - len(shown), len(agreeing)))
    return [_compared(teacher[key], student[key]) for key in common if key in set(shown)]


def _task(name: str) -> Task:
    from matvlm.evaluate import easyvqa

    tasks = {easyvqa.NAME: Task(easyvqa.task, easyvqa.png)}
    if name not in tasks:
        raise EvaluationError(f"evaluate.tasks: unknown task {name!r}; known are {', '.join(sorted(tasks))}")
    return tasks[name]


def _open(checkpoint: Checkpoint, device: str) -> tuple[Any, Any]:
    try:
        model, processor = locate.load(checkpoint.uri, device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise EvaluationError(f"{checkpoint.uri}: cannot open this checkpoint: {error}") from error
    if not hasattr(processor, "image_processor") or not getattr(processor, "chat_template", None):
        raise EvaluationError(f"{checkpoint.uri}: needs an image processor and a chat template to be evaluated")
    return model, processor


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval's results by task, their names without its filter's: ``accuracy,none`` of a task is ``task/accuracy``."""
    return {
        f"{task}/{name.partition(',')[0]}": float(value)
        for task, values in results.items()
        for name, value in values.items()
        if "," in name and "_stderr," not in name
    }


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    doc = sample["doc"]
    return {
        "task": task,
        "id": doc["id"],
        "image_id": doc["image_id"],
        "question": doc["question"],
        "expected": sample["target"],
        "answer": sample["filtered_resps"][0].strip(),
        "right": sample["accuracy"] == 1.0,
    }


def _read_rows(uri: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = map(json.loads, read_bytes(uri).splitlines())
    return {(row["task"], row["id"]): row for row in rows}


def _compared(teacher: dict[str, Any], student: dict[str, Any]) -> ComparedSample:
    return ComparedSample(
        id=teacher["id"],
        question=teacher["question"],
        expected=teacher["expected"],
        teacher_answer=teacher["answer"],
        student_answer=student["answer"],
        teacher_right=teacher["right"],
        student_right=student["right"],
        png=_task(teacher["task"]).png(teacher["image_id"]),
    )
