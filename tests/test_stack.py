"""The local stack: its processes, what they keep, and that nothing is left; and the cluster's MLflow run against it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import psutil
import pytest
import yaml
from loopback import free_port
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "infra"))

import stack  # noqa: E402


def run(command: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """``python infra/stack.py COMMAND`` as a person types it."""
    line = [sys.executable, str(ROOT / "infra" / "stack.py"), command, "--folder", str(folder), *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=180)


def two_free_ports() -> int:
    """A free port that has a free one above it."""
    return next(port for port in iter(free_port, None) if stack.is_free(port + 1))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that another user may enter: Postgres does not run as root."""
    parent = Path(tempfile.mkdtemp(prefix="stack-"))
    parent.chmod(0o755)
    yield parent / "kept"
    run("down", parent / "kept")
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def variables(folder: Path) -> dict[str, str]:
    """What ``up`` tells to export."""
    done = run("up", folder, "--port", str(two_free_ports()))
    assert done.returncode == 0, done.stderr
    lines = (line.removeprefix("export ") for line in done.stdout.splitlines() if line.startswith("export "))
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture
def client(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """Of the stack's server, without keys for the store: the server passes artifacts on."""
    for name in variables:
        monkeypatch.delenv(name, raising=False)
    return MlflowClient(variables["MLFLOW_TRACKING_URI"])


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and not stack.has_ended(psutil.Process(pid))


def stored(variables: dict[str, str]) -> set[str]:
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    keys = {option: variables[name] for option, name in names.items()}
    s3 = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)
    return {item["Key"] for item in s3.list_objects_v2(Bucket="matvlm").get("Contents", [])}


def log_run(client: MlflowClient) -> str:
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "loss", 0.25)
    client.log_text(run_id, "kept", "report/note.txt")
    return run_id


def test_a_run_outlives_the_server_that_took_it(
    folder: Path, variables: dict[str, str], client: MlflowClient, tmp_path: Path
) -> None:
    run_id = log_run(client)
    assert f"mlflow/0/{run_id}/artifacts/report/note.txt" in stored(variables)
    started = json.loads((folder / "state.json").read_text())["processes"]
    os.killpg(started["mlflow"]["pid"], signal.SIGKILL)
    assert run("url", folder).returncode == 1
    again = run("up", folder)
    assert again.returncode == 0, again.stderr
    assert "mlflow runs again" in again.stderr
    assert "s3 runs already" in again.stderr
    assert run("url", folder).stdout.split()[-1] == variables["MLFLOW_TRACKING_URI"]
    assert client.get_run(run_id).data.metrics == {"loss": 0.25}
    assert Path(client.download_artifacts(run_id, "report/note.txt", str(tmp_path))).read_text() == "kept"
    after = json.loads((folder / "state.json").read_text())["processes"]
    assert {name for name in after if after[name] != started[name]} == {"mlflow"}


def test_the_database_is_postgres_where_it_is_installed(folder: Path, variables: dict[str, str]) -> None:
    chosen = json.loads((folder / "state.json").read_text())["database"]
    assert chosen == ("postgres" if stack.postgres_program("initdb") else "sqlite")
    assert (folder / "mlflow.db").exists() == (chosen == "sqlite")
    if chosen == "postgres":
        assert (folder / "postgres").stat().st_mode & 0o077 == 0


def ask(url: str, host: str = "mlflow.matvlm:5000", login: str | None = None) -> int:
    """The status of a GET whose Host header is ``host``."""
    request = urllib.request.Request(url, headers={"Host": host})
    if login:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def cluster_server(folder: Path, variables: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """The URL of MLflow as the cluster starts it, by the manifest's words, on the stack's Postgres and S3."""
    if json.loads((folder / "state.json").read_text())["database"] != "postgres":
        pytest.skip("Postgres is not installed")
    postgres = stack.database(folder)
    subprocess.run([stack.postgres_program("createdb"), "mlflow"], env=os.environ | postgres.variables, check=True)
    objects = list(yaml.safe_load_all((ROOT / "infra/kubernetes/base/services/mlflow.yaml").read_text()))
    maps = {made["metadata"]["name"]: made["data"] for made in objects if made["kind"] == "ConfigMap"}
    (container,) = objects[-1]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "auth.ini").write_text(maps["mlflow-auth"]["auth.ini"])
    environment = {
        **maps["mlflow"],
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "administrator's",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "key",
        "MLFLOW_S3_ENDPOINT_URL": variables["AWS_ENDPOINT_URL"],
        **stack.KEYS,
        **postgres.variables,
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    port = free_port()
    command = [
        str(port) if word == "5000" else "127.0.0.1" if word == "0.0.0.0" else word for word in container["command"]
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not stack.answers(f"{url}/health"):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
        yield url
    finally:
        stack.stop(psutil.Process(process.pid), signal.SIGTERM)


def test_the_cluster_s_server_asks_who_calls_and_by_what_name(
    cluster_server: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    experiments = f"{cluster_server}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert ask(f"{cluster_server}/health", host="10.0.0.7:5000") == 200  # the kubelet's probe
    assert ask(experiments) == 401
    assert ask(experiments, login="admin:guess") == 401
    assert ask(experiments, login="admin:administrator's") == 200
    assert ask(experiments, host="elsewhere:5000", login="admin:administrator's") == 403

    for name, value in {"USERNAME": "admin", "PASSWORD": "administrator's"}.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    get_app_client("basic-auth", cluster_server).create_user("tasks", "a long password")
    for name, value in {"USERNAME": "tasks", "PASSWORD": "a long password"}.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    run_id = log_run(MlflowClient(cluster_server))
    assert f"mlflow/0/{run_id}/artifacts/report/note.txt" in stored(variables)


def test_down_leaves_nothing_behind(folder: Path, variables: dict[str, str]) -> None:
    started = json.loads((folder / "state.json").read_text())["processes"]
    done = run("down", folder)
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    assert [name for name, recorded in started.items() if is_alive(recorded["pid"])] == []
    port = int(variables["MLFLOW_TRACKING_URI"].rpartition(":")[2])
    assert stack.is_free(port)
    assert stack.is_free(port + 1)
    assert run("down", folder).returncode == 0


def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run("up", tmp_path / "kept", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(f"port {port} (mlflow) is taken by another program; make up PORT=")
    assert not (tmp_path / "kept").exists()


def test_sqlite_takes_the_place_of_postgres_and_says_why(tmp_path: Path) -> None:
    chosen, reason = stack.choose_database(tmp_path / ("x" * 100))
    assert chosen == "sqlite"
    assert reason.startswith("SQLite, because")


def test_a_number_that_another_process_got_is_not_taken_for_the_server(tmp_path: Path) -> None:
    kept = stack.Stack(tmp_path)
    started = psutil.Process().create_time()
    kept.state["processes"] = {
        "mlflow": {"pid": os.getpid(), "started": started, "stop": 15},
        "s3": {"pid": os.getpid(), "started": started - 60, "stop": 15},
    }
    assert kept.runs("mlflow")
    assert not kept.runs("s3")
    assert not kept.runs("postgres")
