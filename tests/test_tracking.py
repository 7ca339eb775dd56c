"""Tracking against real MLflow stores: sqlite files, a server on loopback that is killed, and ports nobody answers."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from loopback import free_port
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from matvlm.config import Recipe
from matvlm.gate import Verdict
from matvlm.tracking import Tracker, TrackingError, environment, flatten, resolve_checkpoint, sync
from matvlm.tracking.journal import Journal, open_journal, read_events
from matvlm.tracking.store import Store, open_client

RUN_KEY = "TrainFlow/7"
STEP = "distill[aligned]"
# Opening a step, 100 points and closing it take 0.1 s when a port refuses and 2.0 s (one request of RUNNING_SECONDS)
# when it never answers, mlflow imported already; the room is for a busy machine.
REFUSED_SECONDS, HUNG_SECONDS = 3.0, 6.0


def local_client(folder: Path) -> MlflowClient:
    return open_client(f"sqlite:///{folder / 'mlflow.db'}")


def make_tracker(folder: Path, uri: str | None = None) -> Tracker:
    return Tracker(RUN_KEY, folder / "runs" / "7", "matvlm", uri)


def runs(client: MlflowClient) -> dict[str, Run]:
    """Name -> run of the experiment; a name found twice fails."""
    experiment = client.get_experiment_by_name("matvlm")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    named = {run.info.run_name: run for run in found}
    assert len(named) == len(found)
    return named


def points(client: MlflowClient, step: str, metric: str) -> list[tuple[int, float]]:
    history = client.get_metric_history(runs(client)[step].info.run_id, metric)
    return sorted((point.step, point.value) for point in history)


def losses(numbers: range) -> list[tuple[int, float]]:
    return [(number, 1 / (number + 1)) for number in numbers]


def test_a_run_is_written_as_parent_and_step(folder: Path) -> None:
    tracker = make_tracker(folder)
    params = {f"distill.option_{number}": str(number) for number in range(150)}
    tracker.parent(params | {"long": "x" * 9000}, {"recipe": "debug"})
    plot = folder / "loss.svg"
    plot.write_text("<svg/>")
    with tracker.step(STEP) as run:
        run.params({"init": "aligned"})
        for number in range(1500):
            run.metrics({"loss/total": 1 / (number + 1), "easyvqa/exact_match,none": math.nan}, number)
        run.artifact(plot, "plots")
        plot.unlink()
        run.artifact(folder / "missing.svg")
    tracker.summary({"accuracy": 0.5})
    tracker.finish("FINISHED")

    client = local_client(folder)
    parent, step = runs(client)[RUN_KEY], runs(client)[STEP]
    assert parent.data.params.items() >= params.items()
    assert len(parent.data.params["long"]) == 6000
    assert parent.data.tags["recipe"] == "debug"
    assert parent.data.metrics == {"accuracy": 0.5}
    assert step.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert step.data.params == {"init": "aligned"}
    assert [run.info.status for run in (parent, step)] == ["FINISHED", "FINISHED"]
    assert points(client, STEP, "loss/total") == losses(range(1500))
    assert math.isnan(step.data.metrics["easyvqa/exact_match_none"])
    assert [file.path for file in client.list_artifacts(step.info.run_id, "plots")] == ["plots/loss.svg"]
    assert Path(client.download_artifacts(step.info.run_id, "plots/loss.svg")).read_text() == "<svg/>"


def test_a_resumed_run_continues_the_same_runs_without_repeating_points(folder: Path) -> None:
    first = make_tracker(folder)
    first.parent({"lr": "0.1"}, {})
    with pytest.raises(RuntimeError, match="boom"), first.step(STEP) as run:  # noqa: PT012 - the block is what is tested
        for number in range(130):
            run.metrics({"loss": 1 / (number + 1)}, number)
        run.metrics({"seconds": 5.0})
        raise RuntimeError("boom")
    first.finish("FAILED")
    client = local_client(folder)
    before = {name: run.info.run_id for name, run in runs(client).items()}
    assert {name: run.info.status for name, run in runs(client).items()} == {RUN_KEY: "FAILED", STEP: "FAILED"}

    second = make_tracker(folder)
    with second.step(STEP) as run:
        assert {name: run.info.status for name, run in runs(client).items()} == {RUN_KEY: "RUNNING", STEP: "RUNNING"}
        for number in range(100, 200):
            run.metrics({"loss": 1 / (number + 1)}, number)
        run.metrics({"seconds": 7.0})
    second.parent({"lr": "0.2", "new": "1"}, {})
    second.finish("FINISHED")

    after = runs(client)
    assert {name: run.info.run_id for name, run in after.items()} == before
    assert {run.info.status for run in after.values()} == {"FINISHED"}
    assert points(client, STEP, "loss") == losses(range(200))
    assert after[STEP].data.metrics["seconds"] == 7.0
    assert after[RUN_KEY].data.params == {"lr": "0.1", "new": "1"}
    assert after[RUN_KEY].data.tags["matvlm.changed.lr"] == "0.2"


LOG_UNTIL_KILLED = """
import sys
from pathlib import Path
from matvlm.tracking import Tracker, tracker
tracker.FLUSH_SECONDS = 0.02
with Tracker("TrainFlow/7", Path("runs/7"), "matvlm").step("distill[aligned]") as run:
    for number in range(10**9):
        run.metrics({"loss": 1 / (number + 1)}, number)
        print(number, flush=True)
"""


def test_kill_9_leaves_a_journal_from_which_the_run_continues_exactly(folder: Path) -> None:
    process = start(LOG_UNTIL_KILLED)
    assert process.stdout is not None
    reported = -1
    while reported < 300:
        reported = int(process.stdout.readline())
    process.kill()
    process.wait()
    journal = folder / "runs/7/tracking" / f"{STEP}.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"kind": "metrics", "time": 17')  # what a power cut leaves of a line
    kept = [event["step"] for event, _ in read_events(journal) if event["kind"] == "metrics"]
    assert kept == list(range(len(kept)))
    assert len(kept) > reported

    tracker = make_tracker(folder)
    with tracker.step(STEP) as run:
        for number in range(200, len(kept) + 50):
            run.metrics({"loss": 1 / (number + 1)}, number)
    assert points(local_client(folder), STEP, "loss") == losses(range(len(kept) + 50))
    assert [event["kind"] for event, _ in read_events(journal)].count("open") == 2


def test_a_step_that_died_is_closed_with_the_run(folder: Path) -> None:
    tracker = make_tracker(folder)
    tracker.parent({}, {})
    tracker.step(STEP).__enter__()._journal.close()  # the lock of a process that is gone
    with tracker.step("end"):
        tracker.finish("FAILED")
        assert runs(local_client(folder))["end"].info.status == "RUNNING"
    statuses = {name: run.info.status for name, run in runs(local_client(folder)).items()}
    assert statuses == {RUN_KEY: "FAILED", STEP: "KILLED", "end": "FINISHED"}


def test_an_unreachable_server_costs_no_time_and_sync_delivers_all(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    tracker = log_everything(folder, uri)
    assert time.monotonic() - began < REFUSED_SECONDS
    with make_tracker(folder, uri).step("another process"):
        pass  # as any later step of the run: it finds the outage already noticed
    assert tracker.register("matvlm", "/checkpoints/7", "student", {"accuracy": 0.9}) is None
    verdict = Verdict(passed=True, reasons=["good"], recipe="debug", measured="m", scores={"easyvqa": 90.0}, mean=90.0)
    assert tracker.promote("matvlm", "/checkpoints/7", verdict) is None
    tracker.finish("FINISHED")
    root = folder / "runs" / "7"
    assert sum("cannot be used" in record.message for record in caplog.records) == 1
    assert f"python -m matvlm sync {root}" in caplog.text
    with pytest.raises(TrackingError, match=r"_flow\.jsonl: cannot be sent"):
        sync(root, f"{uri}/still/away")

    target = f"sqlite:///{folder / 'mlflow.db'}"
    journal_lines = sum(path.read_text().count("\n") for path in (root / "tracking").glob("*.jsonl"))
    assert sync(root, target) == journal_lines
    assert sync(root, target) == 0
    client = local_client(folder)
    assert points(client, STEP, "loss") == losses(range(100))
    assert {run.info.status for run in runs(client).values()} == {"FINISHED"}
    assert resolve_checkpoint("models:/matvlm@candidate") == "/checkpoints/7"


def test_a_server_that_never_answers_holds_up_a_step_for_one_short_request(folder: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        log_everything(folder, f"http://127.0.0.1:{deaf.getsockname()[1]}", parent=False)
        assert time.monotonic() - began < HUNG_SECONDS


def log_everything(folder: Path, uri: str, parent: bool = True) -> Tracker:
    tracker = make_tracker(folder, uri)
    if parent:
        tracker.parent({"lr": "0.1"}, {})
    with tracker.step(STEP) as run:
        for number in range(100):
            run.metrics({"loss": 1 / (number + 1)}, number)
    return tracker


def test_a_server_killed_mid_run_gets_everything_once_it_is_back(
    folder: Path, serve: Callable[[int], subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """The server is a bare ``mlflow ui`` in the folder of an earlier local run, which it must show as well."""
    local = Tracker("TrainFlow/6", folder / "runs" / "6", "local")
    (folder / "table.md").write_text("| a |")
    with local.step("evaluate") as run:
        run.artifact(folder / "table.md")

    port = free_port()
    server = serve(port)
    client = open_client(f"http://127.0.0.1:{port}")
    local_run = client.search_runs([client.get_experiment_by_name("local").experiment_id], "tags.matvlm.step != ''")[0]
    query = urllib.parse.urlencode({"path": "table.md", "run_id": local_run.info.run_id})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/get-artifact?{query}") as answer:
        assert answer.read() == b"| a |"

    tracker = make_tracker(folder, f"http://127.0.0.1:{port}")
    tracker.parent({"lr": "0.1"}, {})
    with tracker.step(STEP) as run:
        for number in range(50):
            run.metrics({"loss": 1 / (number + 1), "bad": math.nan}, number)
        run.flush()
        assert points(client, STEP, "loss") == losses(range(50))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        for number in range(50, 100):
            run.metrics({"loss": 1 / (number + 1), "bad": math.nan}, number)
            run.flush()
        run.artifact(folder / "table.md", "tables")
    assert sum("cannot be used" in record.message for record in caplog.records) == 1
    serve(port)
    assert tracker.register("matvlm", str(folder / "checkpoint"), "student", {"accuracy": 0.9}) in (None, "1")
    tracker.finish("FINISHED")

    assert points(client, STEP, "loss") == losses(range(100))
    assert len(points(client, STEP, "bad")) == 100
    step = runs(client)[STEP]
    assert [step.info.status, runs(client)[RUN_KEY].info.status] == ["FINISHED", "FINISHED"]
    assert Path(client.download_artifacts(step.info.run_id, "tables/table.md")).read_text() == "| a |"
    assert resolve_checkpoint("models:/matvlm/1", f"http://127.0.0.1:{port}") == str(folder / "checkpoint")
    assert sync(folder / "runs" / "7") == 0


LOG_ONE_OF_FOUR = """
import sys
from pathlib import Path
import mlflow.tracking
from matvlm.tracking import Tracker
name = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
with Tracker("TrainFlow/7", Path("runs/7"), "matvlm").step(f"targets[{name}]") as run:
    for number in range(200):
        run.metrics({"loss": 1 / (number + 1)}, number)
        if number % 20 == 0:
            run.flush()
"""


def test_four_processes_create_and_fill_one_sqlite_store(folder: Path) -> None:
    (folder / "mlflow.db").unlink()
    processes = [start(LOG_ONE_OF_FOUR, str(number)) for number in range(4)]
    assert [process.stdout.readline() for process in processes if process.stdout] == ["ready\n"] * 4
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], outputs
    make_tracker(folder).finish("FINISHED")  # delivers what a locked database may have put off
    client = local_client(folder)
    assert set(runs(client)) == {RUN_KEY, *(f"targets[{number}]" for number in range(4))}
    for number in range(4):
        assert points(client, f"targets[{number}]", "loss") == losses(range(200))


def test_steps_that_start_at_the_same_moment_share_one_parent(folder: Path) -> None:
    """Without the lock around find-or-create, 4 of 4 trials ended with several parents."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    together = threading.Barrier(6)

    def open_step(number: int) -> None:
        store = Store(uri, folder / "tracking")
        store.client.get_experiment("0")
        together.wait()
        header = {"kind": "open", "time": 1, "run_key": RUN_KEY, "step": f"targets[{number}]", "experiment": "matvlm"}
        store.send(header, [header])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(open_step, range(6)))
    found = runs(local_client(folder))
    assert len(found) == 7
    parents = {run.data.tags.get("mlflow.parentRunId", found[RUN_KEY].info.run_id) for run in found.values()}
    assert parents == {found[RUN_KEY].info.run_id}


def test_a_checkpoint_is_registered_once_and_found_by_name(folder: Path) -> None:
    tracker = make_tracker(folder)
    tracker.parent({}, {})
    assert tracker.register("matvlm", "s3://bucket/a", "student", {"easyvqa/accuracy": 0.9}, {"init": "aligned"}) == "1"
    assert tracker.register("matvlm", "s3://bucket/b", "student", {}) == "2"
    assert make_tracker(folder).register("matvlm", "s3://bucket/b", "student", {}) == "2"
    version = local_client(folder).get_model_version("matvlm", "1")
    assert version.source == "s3://bucket/a"
    assert version.tags["metric.easyvqa/accuracy"] == "0.9"
    assert version.tags["init"] == "aligned"
    assert version.run_id == runs(local_client(folder))[RUN_KEY].info.run_id
    assert resolve_checkpoint("models:/matvlm/1") == "s3://bucket/a"
    assert resolve_checkpoint("models:/matvlm/2") == "s3://bucket/b"
    assert local_client(folder).get_registered_model("matvlm").aliases == {}
    assert resolve_checkpoint("s3://bucket/c") == "s3://bucket/c"


@pytest.mark.parametrize("spec", ["models:/matvlm", "models:/a/b/1", "models:/matvlm@", "models:/no/3", "models:/no@x"])
def test_a_checkpoint_name_that_leads_nowhere_is_one_clear_error(folder: Path, spec: str) -> None:
    with pytest.raises(TrackingError, match=spec):
        resolve_checkpoint(spec)


def test_what_mlflow_refuses_does_not_hold_back_the_rest(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make_tracker(folder)
    with tracker.step(STEP) as run:
        run.metrics({"loss": 1.0}, 1)
        run.metrics({"..": 1.0}, 1)
        run.metrics({"loss": 0.5}, 2)
        run.metrics({"loss": "much"}, 3)  # type: ignore[dict-item]
    assert points(local_client(folder), STEP, "loss") == [(1, 1.0), (2, 0.5)]
    assert sum("refuses a metrics event" in record.message for record in caplog.records) == 1
    assert "loss is not a number: 'much'" in caplog.text


def test_a_full_disk_delays_events_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    journal = open_journal(tmp_path, STEP)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        for number in range(50):
            journal.append("metrics", step=number, values={"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert journal.path.stat().st_size == 1000
    journal.append("metrics", step=50, values={"loss": 1.0})
    assert [event["step"] for event, _ in journal.events()] == list(range(51))
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_two_attempts_at_once_write_beside_each_other(tmp_path: Path) -> None:
    with open_journal(tmp_path, STEP) as first, open_journal(tmp_path, STEP) as second:
        assert [first.path.name, second.path.name] == [f"{STEP}.jsonl", f"{STEP}.1.jsonl"]
    with Journal(first.path) as again:
        assert list(again.events()) == []


def test_a_recipe_becomes_flat_readable_parameters() -> None:
    flat = flatten(Recipe(name="debug").model_dump(mode="json"))
    assert flat["name"] == "debug"
    assert flat["distill.optimizer.lr"] == "0.0002"
    assert flat["distill.optimizer.betas"] == "[0.9, 0.95]"
    assert flat["data.path"] == "null"
    assert flat["distill.train_connector"] == "true"


def test_the_environment_names_versions_and_no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do-not-tell")
    found = environment()
    assert found["env.version.torch"].startswith("2.")
    assert found["env.torch_threads"].isdigit()
    assert "do-not-tell" not in "".join(found.values())


def test_names_that_cannot_be_searched_for_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run_key"):
        Tracker("it's", tmp_path, "matvlm")


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
