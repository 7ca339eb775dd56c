"""How right an answer to MM-Vet is, 0 to 1, by a language model behind any OpenAI-compatible endpoint.

``MATVLM_JUDGE_URL`` (as ``https://HOST/v1``), ``MATVLM_JUDGE_MODEL`` and, if it needs one, ``MATVLM_JUDGE_KEY`` name
the judge. ``MATVLM_JUDGE_TIMEOUT`` is how many seconds it has, 60 by default, and ``MATVLM_JUDGE_PAUSE`` how many to
wait before a second try, 1 by default and doubled for the next. Without a judge, or where it fails, the result is not a
number. What was judged is kept in ``MATVLM_JUDGE_CACHE`` (``judge`` in matvlm's cache), so that a repeated evaluation
asks for the rest alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Any

TRIES = 3
FAILURES_IN_A_ROW = 3
"""After so many questions an endpoint counts as down and is left alone for ``REST_SECONDS``."""
REST_SECONDS = 60.0

TASK = """\
You grade answers to questions about images. Each row of the table has a question, the ground truth, a model's
prediction and how correct that prediction is: 0.0 when it is totally wrong, 1.0 when it is totally right, in steps of
0.1. Where the ground truth joins elements by <AND>, only a prediction with all of them is totally right, and one with
some of them is partly right; where it joins them by <OR>, any one of them is enough.
Reply with the missing correctness of the last row and nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which two numbers solve the equation? | 2 <AND> 7 | 4 | 0.0
Which two numbers solve the equation? | 2 <AND> 7 | x = 2 | 0.5
Which two numbers solve the equation? | 2 <AND> 7 | It is 2 or 5. | 0.5
Which two numbers solve the equation? | 2 <AND> 7 | x = 7 and x = 2 | 1.0
What is the animal on the left? | a pony <OR> a small horse | A small brown horse. | 1.0
What is the animal on the left? | a pony <OR> a small horse | A donkey | 0.0
Why is the picture funny? | The cat wears a tie at a desk as if it worked there. | The cat wears a tie. | 0.4
"""

log = logging.getLogger("matvlm.tasks")
_failures: Counter[str] = Counter()
_rests_until: dict[str, float] = {}
_NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d]|\.\d)")


class JudgeError(RuntimeError):
    """The judge gave no grade; the message says why."""


def score(doc: Mapping[str, Any], answers: list[str]) -> dict[str, Any]:
    """``correctness`` of the first answer, over all questions and by capability, and whether it is ``judged``."""
    correctness = float("nan")
    if os.environ.get("MATVLM_JUDGE_URL"):
        try:
            correctness = judge(doc["question"], doc["target"], answers[0])
        except JudgeError as error:
            log.warning("%s: not judged: %s", doc["id"], error)
    by_capability = (doc["capabilities"], correctness)
    names = (f"correctness_{name}" for name in ("rec", "ocr", "know", "gen", "spat", "math"))
    judged = float(correctness == correctness)
    return {"correctness": correctness, "judged": judged, **dict.fromkeys(names, by_capability)}


def judge(question: str, truth: str, answer: str) -> float:
    """The judge's grade, 0 to 1, kept from before or asked for.

    Raises:
        JudgeError: the environment does not name a model, or the endpoint does not give a grade.
    """
    model = os.environ.get("MATVLM_JUDGE_MODEL")
    if not model:
        raise JudgeError("MATVLM_JUDGE_MODEL is not set: name the model to ask")
    prompt = f"{TASK}{' | '.join(' '.join(cell.split()) for cell in (question, truth, answer))} |"
    kept = _folder() / f"{sha256(json.dumps([model, prompt]).encode()).hexdigest()}.json"
    try:
        return float(json.loads(kept.read_text(encoding="utf-8"))["correctness"])
    except (OSError, ValueError, KeyError, TypeError):
        grade = _ask_patiently(model, prompt)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps({"correctness": grade, "model": model, "prompt": prompt}), encoding="utf-8")
        written.replace(kept)
    except OSError as error:
        log.warning("%s: cannot keep what was judged: %s", kept, error)
    return grade


def read_grade(reply: str) -> float:
    """The first number from 0 to 1 in the judge's reply, in its last cell if it repeats the row.

    Raises:
        JudgeError: there is none.
    """
    found = _NUMBER.findall(reply.strip().rstrip("|").rpartition("|")[2])
    if not found:
        raise JudgeError(f"replied {reply[:80]!r}, which holds no number from 0 to 1")
    return float(found[0])


def _setting(name: str, otherwise: float) -> float:
    return float(os.environ.get(f"MATVLM_JUDGE_{name}") or otherwise)


def _folder() -> Path:
    cache = os.environ.get("MATVLM_CACHE") or Path.home() / ".cache" / "matvlm"
    return Path(os.environ.get("MATVLM_JUDGE_CACHE") or Path(cache) / "judge")


def _ask_patiently(model: str, prompt: str) -> float:
    url = os.environ["MATVLM_JUDGE_URL"].rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    if time.monotonic() < _rests_until.get(url, 0.0):
        raise JudgeError(f"{url} failed {FAILURES_IN_A_ROW} times in a row and is left alone for a while")
    for attempt in range(TRIES):
        time.sleep(_setting("PAUSE", 1.0) * 2 ** (attempt - 1) if attempt else 0)
        try:
            grade = read_grade(_ask(url, model, prompt))
        except urllib.error.HTTPError as error:
            reason = f"{url} answered HTTP {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                break
        except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError, JudgeError) as error:
            reason = f"{url}: {getattr(error, 'reason', None) or error!r}"
        else:
            _failures[url] = 0
            return grade
    _failures[url] += 1
    if _failures[url] >= FAILURES_IN_A_ROW:
        _rests_until[url] = time.monotonic() + REST_SECONDS
    raise JudgeError(reason)


def _ask(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 64}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MATVLM_JUDGE_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=_setting("TIMEOUT", 60.0)) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])
