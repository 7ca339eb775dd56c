"""An evaluation that is killed goes on, and one that two processes share comes to the same result."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import benchmark_data
import pytest
import tiny_evaluation
from lm_eval import evaluator
from lm_eval.api.task import ConfigurableTask

from matvlm.artifacts import Checkpoint, EvalResult
from matvlm.config import Evaluate
from matvlm.evaluate import evaluate
from matvlm.evaluate.answers import PREFIX
from matvlm.evaluate.harness import VLM
from matvlm.evaluate.results import RESULTS, SAMPLES
from matvlm.reporting import Reporter
from matvlm.world import join

SECONDS = 120.0
LIKELIHOOD_TOLERANCE = 1e-5
"""Nats; other questions share the batch. Measured with 5 batch sizes and 3 seeds: at most 2.9e-6."""


def start(program: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def answered(path: Path) -> Counter[str]:
    """How often the answer to each question is kept in a file."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    return Counter(key for line in lines for key in json.loads(line)["answers"])


def evaluate_easyvqa(uri: str, out: str) -> EvalResult:
    return evaluate(Checkpoint(uri=uri, label="student"), Evaluate(batch_size=1), 60, Path(out), Reporter())


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    checkpoint = tiny_evaluation.save(tmp_path / "model", "student", (0, 2))
    out, whole = tmp_path / "killed", tmp_path / "whole"
    kept = out / "easyvqa" / f"{PREFIX}0.jsonl"
    program = f"import test_evaluate_processes as t; t.evaluate_easyvqa({checkpoint.uri!r}, {str(out)!r})"
    process = start(program)
    started = time.monotonic()
    while not kept.exists() or kept.stat().st_size < 1500:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - started < SECONDS
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "easyvqa" / RESULTS).exists(), "it was over before it could be killed"
    before = kept.read_text().rpartition("\n")[0]
    assert 0 < before.count("\n") < 60

    result, expected = evaluate_easyvqa(checkpoint.uri, str(out)), evaluate_easyvqa(checkpoint.uri, str(whole))
    assert (result.metrics, result.scores) == (expected.metrics, expected.scores)
    assert (out / SAMPLES).read_bytes() == (whole / SAMPLES).read_bytes()
    assert kept.read_text().startswith(before), "what was answered stays"
    assert answered(kept) == answered(whole / "easyvqa" / f"{PREFIX}0.jsonl"), "and is not asked again"


def choice_task() -> ConfigurableTask:
    """Multiple choice with images: which of four colours fills the image?"""
    import datasets

    colours = ["red", "green", "blue", "big small"]
    rows = [{"id": str(n), "seed": n, "answer": n % 4} for n in range(13)]
    config = {
        "task": "choice",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: "<image>what color?",
        "doc_to_image": lambda doc: [tiny_evaluation.random_images(13)[doc["seed"]]],
        "doc_to_choice": lambda doc: colours,
        "doc_to_target": lambda doc: doc["answer"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    return ConfigurableTask(config=config)


def likelihoods(processor: Any, model: Any, device: str = "cpu") -> dict[str, Any] | None:
    """lm-eval's accuracy and every log-likelihood, as this process gets them."""
    world, _ = join(device)
    vlm = VLM(model, processor, 5, world=world)
    results = evaluator.evaluate(vlm, {"tasks": {"choice": choice_task()}, "groups": {}}, bootstrap_iters=0)
    if results is None:
        return None
    samples = sorted(results["samples"]["choice"], key=lambda sample: sample["doc_id"])
    values = [[float(value) for value, _ in sample["filtered_resps"]] for sample in samples]
    return {"accuracy": results["results"]["choice"]["acc,none"], "values": values}


def text_task() -> ConfigurableTask:
    """Perplexity of five texts of different lengths."""
    import datasets

    words = tiny_evaluation.WORDS.split()
    rows = [{"id": str(n), "text": " ".join(words[n:] * (n + 1))} for n in range(5)]
    config = {
        "task": "texts",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
        "metadata": {"version": 1},
    }
    return ConfigurableTask(config=config)


def perplexity(processor: Any, model: Any) -> float | None:
    """lm-eval's, as this process gets it."""
    world, _ = join("cpu")
    vlm = VLM(model, processor, 2, world=world)
    results = evaluator.evaluate(vlm, {"tasks": {"texts": text_task()}, "groups": {}}, bootstrap_iters=0)
    return None if results is None else float(results["results"]["texts"]["word_perplexity,none"])


def share(folder: str) -> None:
    """What each process of a shared evaluation does; ``folder`` has the model and the data."""
    processor = tiny_evaluation.build_processor()
    model = tiny_evaluation.build(processor, (0, 2))
    seen: dict[str, Any] = {"likelihoods": likelihoods(processor, model), "perplexity": perplexity(processor, model)}
    result = evaluate_both(Path(folder), Path(folder, "shared"))
    seen["result"] = result.model_dump(mode="json")
    Path(folder, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def evaluate_both(folder: Path, out: Path) -> EvalResult:
    """POPE, whose records are named tuples, easy-VQA, and GQA, whose data are missing.

    Of easy-VQA the first process gets no question about colours and the second none about shapes.
    """
    settings = Evaluate(
        tasks=["gqa", "pope", "easyvqa"],
        data={"pope": str(folder / "pope"), "gqa": str(folder / "nothing")},
        batch_size=5,
    )
    return evaluate(Checkpoint(uri=str(folder / "model"), label="student"), settings, 9, out, Reporter())


def test_two_processes_come_to_the_result_of_one(tmp_path: Path) -> None:
    tiny_evaluation.save(tmp_path / "model", "student", (0, 2))
    benchmark_data.write("pope", tmp_path / "pope")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = f"import test_evaluate_processes as t; t.share({str(tmp_path)!r})"
    processes = [start(program, RANK=str(rank), LOCAL_RANK=str(rank), **world) for rank in range(2)]
    for process in processes:
        output = process.communicate(timeout=SECONDS)[0]
        assert process.returncode == 0, output
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2))

    processor = tiny_evaluation.build_processor()
    model = tiny_evaluation.build(processor, (0, 2))
    alone = likelihoods(processor, model)
    assert alone
    assert second["likelihoods"] is None, "lm-eval gives its result to the first process"
    assert first["likelihoods"]["accuracy"] == alone["accuracy"]
    for shared, own in zip(first["likelihoods"]["values"], alone["values"], strict=True):
        assert shared == pytest.approx(own, abs=LIKELIHOOD_TOLERANCE)

    assert second["perplexity"] is None
    assert first["perplexity"] == pytest.approx(perplexity(processor, model), rel=LIKELIHOOD_TOLERANCE)

    expected = evaluate_both(tmp_path, tmp_path / "alone")
    assert first["result"] == second["result"]
    result = EvalResult.model_validate(first["result"])
    assert (result.metrics, result.scores, result.failed) == (expected.metrics, expected.scores, expected.failed)
    assert "no such folder" in result.failed["gqa"]
    assert (tmp_path / "shared" / SAMPLES).read_bytes() == (tmp_path / "alone" / SAMPLES).read_bytes()
    records = [json.loads((tmp_path / name / "pope" / RESULTS).read_text()) for name in ("shared", "alone")]
    assert [record["settings"]["processes"] for record in records] == [2, 1]
    assert records[0]["data"] == records[1]["data"]
    counts = [len(answered(tmp_path / "shared" / "easyvqa" / f"{PREFIX}{rank}.jsonl")) for rank in range(2)]
    assert sorted(counts) == [4, 5]
    assert {"easyvqa/accuracy_color", "easyvqa/accuracy_shape"} < set(result.metrics)
