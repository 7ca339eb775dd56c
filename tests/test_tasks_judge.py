"""MM-Vet's judge, a real server on loopback: asked with patience, never averaged over what it did not say, resumed."""

from __future__ import annotations

import json
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
from lm_eval import evaluator
from test_tasks_run import ANSWERS, Scripted

from matvlm.evaluate import tasks
from matvlm.evaluate.tasks.mmvet import judge

Reply = tuple[int, str]


def says(content: str) -> Reply:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


class Endpoint:
    """An OpenAI-compatible endpoint that answers a request by ``reply(last row of the table, how often it came)``."""

    def __init__(self, reply: Callable[[str, int], Reply]):
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                row = body["messages"][0]["content"].splitlines()[-1]
                seen = sum(each["row"] == row for each in endpoint.requests)
                endpoint.requests.append({**body, "row": row, "path": self.path})
                endpoint.keys.append(self.headers["Authorization"])
                status, content = reply(row, seen)
                self.send_response(status)
                self.end_headers()
                with suppress(BrokenPipeError):  # who asked did not wait
                    self.wfile.write(content.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> Endpoint:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A model's name and an empty cache; no waiting for long between tries."""
    monkeypatch.setenv("MATVLM_JUDGE_MODEL", "judge-1")
    monkeypatch.setenv("MATVLM_JUDGE_CACHE", str(tmp_path / "judged"))
    monkeypatch.setenv("MATVLM_JUDGE_TIMEOUT", "5")
    monkeypatch.setenv("MATVLM_JUDGE_PAUSE", "0.02")
    for name in ("MATVLM_JUDGE_KEY", "MATVLM_JUDGE_URL"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def evaluate(tmp_path: Path) -> tuple[dict[str, float], list[float]]:
    """The metrics of MM-Vet, and each answer's correctness."""
    root = tmp_path / "data"
    if not root.exists():
        benchmark_data.write("mmvet", root)
    task = tasks.build(["mmvet"], {"mmvet": str(root)})["mmvet"]
    lm = Scripted(dict(zip(task.eval_docs["id"], ANSWERS["mmvet"], strict=True)))
    results = evaluator.evaluate(lm, {"tasks": {"mmvet": task}, "groups": {}}, bootstrap_iters=0)
    metrics = {name.partition(",")[0]: value for name, value in results["results"]["mmvet"].items() if ",none" in name}
    return metrics, [sample["correctness"] for sample in results["samples"]["mmvet"]]


GRADES = {"equation": "0.5", "room": "1.0", "animal": "0.0"}


def grade(row: str) -> str:
    return next(value for word, value in GRADES.items() if word in row)


def test_grades_become_the_score(tmp_path: Path, settings: pytest.MonkeyPatch) -> None:
    with Endpoint(lambda row, _: says(grade(row))) as endpoint:
        settings.setenv("MATVLM_JUDGE_URL", endpoint.url)
        settings.setenv("MATVLM_JUDGE_KEY", "secret")
        metrics, each = evaluate(tmp_path)
        again = evaluate(tmp_path)
    assert each == [0.5, 1.0, 0.0]
    assert metrics["correctness"] == 0.5
    assert metrics["judged"] == 1.0
    by_capability = [metrics[f"correctness_{name}"] for name in ("rec", "ocr", "spat", "math")]
    assert by_capability == [0.5, 0.5, 1.0, 0.5]
    assert math.isnan(metrics["correctness_know"]), "no question needs it"
    assert again == (pytest.approx(metrics, nan_ok=True), each)
    assert len(endpoint.requests) == 3, "what was judged is not asked again"
    first = endpoint.requests[0]
    assert first["path"] == "/v1/chat/completions"
    assert (first["model"], first["temperature"]) == ("judge-1", 0)
    assert first["row"] == "What is x in the equation? | -1 <AND> -5 | x = -1 |"
    assert endpoint.keys == ["Bearer secret"] * 3


def test_another_model_or_answer_is_judged_anew(settings: pytest.MonkeyPatch) -> None:
    with Endpoint(lambda row, seen: says(f"0.{seen}")) as endpoint:
        settings.setenv("MATVLM_JUDGE_URL", f"{endpoint.url}/chat/completions")
        assert judge.judge("q", "t", "a") == judge.judge("q", "t", "a") == 0.0
        settings.setenv("MATVLM_JUDGE_MODEL", "judge-2")
        assert judge.judge("q", "t", "a") == 0.1
        judge.judge("q", "t", "another")
    assert len(endpoint.requests) == 3
    assert endpoint.keys == [None] * 3


def test_a_failing_endpoint_is_tried_again(settings: pytest.MonkeyPatch) -> None:
    broken = [(503, "busy"), (200, "no JSON"), (200, "{}"), (429, "slow down"), says("good"), (200, "[]")]
    for failure in broken:
        with Endpoint(lambda row, seen, failure=failure: says("0.8") if seen == 2 else failure) as endpoint:
            settings.setenv("MATVLM_JUDGE_URL", endpoint.url)
            assert judge.judge("q", str(failure), "a") == 0.8
            assert len(endpoint.requests) == 3


def test_what_was_not_judged_is_no_part_of_a_mean(
    tmp_path: Path, settings: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One question refused for good: no score, the others kept, and only that one asked when it is resumed."""
    with Endpoint(lambda row, _: (400, "too rude") if "room" in row else says(grade(row))) as endpoint:
        settings.setenv("MATVLM_JUDGE_URL", endpoint.url)
        with caplog.at_level(logging.WARNING, logger="matvlm.tasks"):
            metrics, each = evaluate(tmp_path)
    assert [each[0], each[2]] == [0.5, 0.0]
    assert math.isnan(each[1])
    assert math.isnan(metrics["correctness"])
    assert metrics["judged"] == pytest.approx(2 / 3)
    assert math.isnan(metrics["correctness_spat"])
    assert metrics["correctness_math"] == 0.5
    assert f"mmvet-v1_1: not judged: {endpoint.url}/chat/completions answered HTTP 400: too rude" in caplog.text
    assert len(endpoint.requests) == 3, "a refusal is not asked again"
    with Endpoint(lambda row, _: says(grade(row))) as mended:
        settings.setenv("MATVLM_JUDGE_URL", mended.url)
        metrics, _ = evaluate(tmp_path)
    assert metrics["correctness"] == 0.5
    assert len(mended.requests) == 1


def test_an_endpoint_that_is_down_is_named_and_left_alone(
    tmp_path: Path, settings: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    settings.setenv("MATVLM_JUDGE_URL", url)
    with caplog.at_level(logging.WARNING, logger="matvlm.tasks"):
        metrics, _ = evaluate(tmp_path)
    assert math.isnan(metrics["correctness"])
    assert metrics["judged"] == 0.0
    assert caplog.text.count("not judged") == 3
    assert f"{url}/chat/completions: " in caplog.text
    assert "refused" in caplog.text
    with pytest.raises(judge.JudgeError, match="failed 3 times in a row and is left alone") as left_alone:
        evaluate_one()
    assert url in str(left_alone.value)


def evaluate_one() -> float:
    """By the very module that the tasks use, which lm-eval loads by its path."""
    import sys

    module = sys.modules[str(tasks.FOLDER / "mmvet" / "judge")]
    try:
        return float(module.judge("q", "t", "a"))
    except module.JudgeError as error:
        raise judge.JudgeError(str(error)) from error


def test_a_slow_endpoint_is_not_waited_for(settings: pytest.MonkeyPatch) -> None:
    def late(row: str, seen: int) -> Reply:
        time.sleep(1)
        return says("1.0")

    with Endpoint(late) as endpoint:
        settings.setenv("MATVLM_JUDGE_URL", endpoint.url)
        settings.setenv("MATVLM_JUDGE_TIMEOUT", "0.1")
        started = time.monotonic()
        with pytest.raises(judge.JudgeError, match="timed out"):
            judge.judge("q", "t", "a")
        assert time.monotonic() - started < 2
        assert len(endpoint.requests) == judge.TRIES


def test_without_a_judge_or_its_model_there_is_no_score(
    tmp_path: Path, settings: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, each = evaluate(tmp_path)
    assert metrics["judged"] == 0.0
    assert math.isnan(metrics["correctness"])
    assert all(map(math.isnan, each))
    settings.setenv("MATVLM_JUDGE_URL", "http://127.0.0.1:9/v1")
    settings.delenv("MATVLM_JUDGE_MODEL")
    with caplog.at_level(logging.WARNING, logger="matvlm.tasks"):
        evaluate(tmp_path)
    assert "MATVLM_JUDGE_MODEL is not set" in caplog.text


def test_damaged_and_secret_things(tmp_path: Path, settings: pytest.MonkeyPatch) -> None:
    """A damaged file of the cache is judged anew, and the key is in none of them."""
    with Endpoint(lambda row, seen: says("0.3")) as endpoint:
        settings.setenv("MATVLM_JUDGE_URL", endpoint.url)
        settings.setenv("MATVLM_JUDGE_KEY", "secret")
        judge.judge("q", "t", "a | b\nc")
        (kept,) = (tmp_path / "judged").iterdir()
        assert "secret" not in kept.read_text()
        assert endpoint.requests[0]["row"] == "q | t | a | b c |"
        kept.write_text("{")
        assert judge.judge("q", "t", "a | b\nc") == 0.3
        assert len(endpoint.requests) == 2
