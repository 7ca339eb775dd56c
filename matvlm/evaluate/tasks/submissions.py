"""The files that evaluation servers and the authors' own evaluators want, from a task's answers.

A row is a document of the task with its ``answer``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matvlm.evaluate.tasks.vqa import normalise_evalai

Rows = Sequence[Mapping[str, Any]]


def mmbench(rows: Rows, folder: Path) -> Path:
    """``mmbench.xlsx`` for OpenCompass: index, question, options, the prediction, and the answer where it is known."""
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    known = ["answer"] if any(row["target"] for row in rows) else []
    sheet.append(["index", "question", *"ABCD", "prediction", *known])
    for row in rows:
        options = dict(zip(row["options"], row["choices"], strict=True))
        cells = [row["question"], *(options.get(letter, "") for letter in "ABCD"), row["answer"]]
        cells += [row["target"]] * len(known)
        sheet.append([row["index"], *(ILLEGAL_CHARACTERS_RE.sub("", cell) for cell in cells)])
    path = folder / "mmbench.xlsx"
    book.save(path)
    return path


def vqav2(rows: Rows, folder: Path) -> Path:
    """``vqav2.json`` for EvalAI: a list of question_id and answer, the latter as its answer processor leaves it."""
    answers = [{"question_id": row["question_id"], "answer": normalise_evalai(row["answer"])} for row in rows]
    return _write(folder / "vqav2.json", answers)


def mmvet(rows: Rows, folder: Path) -> Path:
    """``mmvet.json`` for MM-Vet's evaluator: the answer by ``v1_NUMBER``, the question's id."""
    return _write(folder / "mmvet.json", {row["image_id"]: row["answer"] for row in rows})


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path
