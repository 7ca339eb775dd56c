"""A tracked run on MLflow's real server with its database and an S3 store: what arrives, what an outage costs, the page
that compares runs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event

import boto3
import psutil
import pytest
from loopback import free_port
from mlflow import MlflowClient
from mlflow.entities import Run

from matvlm.gate import Verdict
from matvlm.plots import loss_curves
from matvlm.tracking import Tracker, resolve_checkpoint, tracker

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "infra"))

import compare  # noqa: E402
from browser import headless  # noqa: E402
from stack import KEYS, Stack, is_free  # noqa: E402

STEP = "distill[aligned]"
POINTS = 30
"""Of each metric before the outage and after it, at least."""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """As ``make up`` starts it, in a folder that another user may enter: Postgres does not run as root."""
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o755)
    port = next(port for port in iter(free_port, None) if is_free(port + 1))
    started = Stack(folder / "kept", port)
    try:
        started.up()
        yield started
    finally:
        started.down()
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has the keys of the store, the run has none."""
    for name in (*KEYS, "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def stored(stack: Stack, run_id: str) -> dict[str, bytes]:
    """The artifacts of a run as they are in the bucket, by name."""
    keys = {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}
    s3 = boto3.client("s3", endpoint_url=stack.endpoint, region_name=KEYS["AWS_DEFAULT_REGION"], **keys)
    found = s3.list_objects_v2(Bucket="matvlm", Prefix="mlflow/").get("Contents", [])
    mine = [item["Key"] for item in found if f"/{run_id}/artifacts/" in item["Key"]]
    return {key.partition("/artifacts/")[2]: s3.get_object(Bucket="matvlm", Key=key)["Body"].read() for key in mine}


def runs(stack: Stack, experiment: str) -> dict[str, Run]:
    """Name -> run; a name found twice fails."""
    client = MlflowClient(stack.url)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found)
    return named


def test_all_that_a_run_tracks_is_in_the_database_and_the_bucket(stack: Stack, tmp_path: Path) -> None:
    plot, table = tmp_path / "loss.png", tmp_path / "scores.json"
    loss_curves([{"update": n, "loss": 1 / n} for n in range(1, 9)], plot)
    table.write_text('{"columns": ["task", "drop"], "data": [["gqa", 0.5]]}')
    tracked = Tracker("all/1", tmp_path / "run", "all", stack.url)
    tracked.parent({"hybrid.ratio": "0.25"}, {"recipe": "debug"})
    with tracked.step(STEP) as run:
        run.params({"init": "aligned"})
        run.metrics({"loss": 0.5, "lr": 1e-3}, 1)
        run.artifact(plot, "plots")
        run.table(table, "report")
    tracked.summary({"accuracy/student": 0.75})
    version = tracked.register("all", "s3://models/student", "student", {"accuracy": 0.75}, {"layers": "[0, 4]"})
    verdict = Verdict(passed=True, reasons=["good"], recipe="debug", measured="m", scores={"easyvqa": 75.0}, mean=75.0)
    aliases = tracked.promote("all", "s3://models/student", verdict)
    tracked.finish("FINISHED")

    parent, step = runs(stack, "all")["all/1"], runs(stack, "all")[STEP]
    assert parent.data.params == {"hybrid.ratio": "0.25"}
    assert parent.data.metrics == {"accuracy/student": 0.75}
    assert (step.data.params, step.data.metrics) == ({"init": "aligned"}, {"loss": 0.5, "lr": 1e-3})
    assert step.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert [run.info.status for run in (parent, step)] == ["FINISHED", "FINISHED"]
    assert stored(stack, step.info.run_id) == {
        "plots/loss.png": plot.read_bytes(),
        "report/scores.json": table.read_bytes(),
    }
    found = MlflowClient(stack.url).get_model_version("all", str(version))
    assert (found.run_id, found.tags["layers"], found.tags["gate"]) == (parent.info.run_id, "[0, 4]", "passed")
    assert aliases == ["candidate", "champion"]
    assert resolve_checkpoint("models:/all@champion", stack.url) == "s3://models/student"


def kill_server(stack: Stack) -> None:
    """SIGKILL to MLflow's processes; returns when none is left."""
    server = psutil.Process(stack.state["processes"]["mlflow"]["pid"])
    family = [server, *server.children(recursive=True)]
    os.killpg(server.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []


def test_a_server_killed_under_a_run_at_work_has_every_value_once(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed while values are being sent, stays away for some, and is back for the last ones."""
    monkeypatch.setattr(tracker, "FLUSH_SECONDS", 0.0)  # a request for each value: one is under way when it dies
    monkeypatch.setattr("matvlm.tracking.delivery.LONGEST_PAUSE_SECONDS", 0.2)
    tracked, busy, back = Tracker("killed/1", tmp_path / "run", "killed", stack.url), Event(), Event()
    tracked.parent({}, {})
    plot = tmp_path / "plot.svg"
    plot.write_text("<svg/>")

    def work() -> int:
        with tracked.step(STEP) as run:
            for number in count():
                run.metrics({"loss": 1 / (number + 1), "lr": number / 7}, number)
                if number == POINTS:
                    busy.set()
                if number == 2 * POINTS:  # long before the server is back
                    run.artifact(plot, "plots")
                if number > 3 * POINTS and back.is_set():
                    return number + 1
                time.sleep(0.01)
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(work)
        assert busy.wait(60)
        try:
            kill_server(stack)
            stack.up()
        finally:
            back.set()
        points = worker.result(60)
    tracked.finish("FINISHED")

    assert sum("cannot be used" in record.message for record in caplog.records) == 1
    assert sum("is back" in record.message for record in caplog.records) == 1
    step = runs(stack, "killed")[STEP]
    client = MlflowClient(stack.url)
    for metric, expected in (("loss", lambda n: 1 / (n + 1)), ("lr", lambda n: n / 7)):
        history = client.get_metric_history(step.info.run_id, metric)
        assert sorted((point.step, point.value) for point in history) == [(n, expected(n)) for n in range(points)]
    assert stored(stack, step.info.run_id) == {"plots/plot.svg": b"<svg/>"}
    assert {run.info.status for run in runs(stack, "killed").values()} == {"FINISHED"}


def test_the_compare_page_shows_three_runs_and_their_scores(stack: Stack, tmp_path: Path) -> None:
    pytest.importorskip("selenium.webdriver", reason="needs selenium, see requirements.txt")
    scores = {"teacher": 0.938, "hybrid-25": 0.906, "hybrid-50": 0.812}
    for name, accuracy in scores.items():
        tracked = Tracker(name, tmp_path / name, "compared", stack.url)
        tracked.parent({"recipe": name}, {})
        tracked.summary({"easyvqa/accuracy": accuracy})
        tracked.finish("FINISHED")
    found = runs(stack, "compared")
    ids = [found[name].info.run_id for name in scores]
    try:
        with headless(tmp_path / "profile", compare.SIZE) as browser:
            page = compare.open_comparison(
                browser, stack.url, found["teacher"].info.experiment_id, ids, "easyvqa/accuracy"
            )
            shown = browser.get_screenshot_as_png()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [text for text in (*scores, *map(str, scores.values())) if text not in page] == []
    assert shown.startswith(b"\x89PNG")
