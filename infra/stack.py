"""An MLflow server, its database and an S3 store as plain processes on loopback, for work without a cluster.

    python infra/stack.py up       # start what does not run, and print what to export
    python infra/stack.py url      # where MLflow's pages are; exit status 1 if the server does not run
    python infra/stack.py down     # stop everything and delete all that it kept

``make up`` and ``make down`` do the same. The database is Postgres where that is installed, else SQLite; the store is
MinIO where its program is on PATH, else moto, which keeps its objects in memory. One folder holds all that there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

FOLDER = Path(__file__).resolve().parent / ".stack"
BUCKET = "matvlm"
KEYS = {"AWS_ACCESS_KEY_ID": "matvlm", "AWS_SECRET_ACCESS_KEY": "only-on-loopback", "AWS_DEFAULT_REGION": "us-east-1"}
POSTGRES_USER = "matvlm"
LONGEST_SOCKET_PATH = 107
START_SECONDS = 120.0
STOP_SECONDS = 15.0


class StackError(Exception):
    """What is wrong and what to do about it, in one line; the end of a log may follow."""


class Service(NamedTuple):
    name: str
    command: list[str]
    variables: dict[str, str]
    ready: Callable[[], bool]
    user: str | None = None
    """Whom the process runs as; None is whoever starts it."""
    stop: signal.Signals = signal.SIGTERM
    forgets: str = ""
    """What is lost when it ends, for people."""


class Stack:
    """The services in ``folder``; ``state.json`` there says what was chosen and what was started, in this order."""

    def __init__(self, folder: Path, port: int = 5000):
        self.folder = folder.resolve()
        self._place = self.folder / "state.json"
        self.state: dict[str, Any] = {"port": port, "database": None, "processes": {}}
        if self._place.is_file():
            self.state = json.loads(self._place.read_text())
        self.port: int = self.state["port"]
        self.url = f"http://127.0.0.1:{self.port}"
        self.endpoint = f"http://127.0.0.1:{self.port + 1}"

    def up(self) -> None:
        """Start the services that do not run, one after the other.

        Raises:
            StackError: a port is taken, or a service ended or did not answer in ``START_SECONDS``.
        """
        for name, port in {"mlflow": self.port, "s3": self.port + 1}.items():
            if not self.runs(name) and not is_free(port):
                advice = f"make up PORT={self.port + 100} takes that port and the one above it"
                raise StackError(f"port {port} ({name}) is taken by another program; {advice}")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.state["database"] is None:
            self.state["database"], reason = choose_database(self.folder)
            print(f"Database: {reason}", file=sys.stderr)
            self._save()
        for service in self._services():
            if self.runs(service.name):
                print(f"{service.name} runs already", file=sys.stderr)
                continue
            self._start(service)
            if service.name == "s3":
                self._make_bucket()
        lines = (f"export {name}={value}\n" for name, value in self.variables().items())
        (self.folder / "env").write_text("".join(lines))

    def down(self) -> None:
        """Stop the services, the last first, and delete the folder."""
        for name in reversed(self.state["processes"]):
            if self.runs(name):
                stop(self._process(name), signal.Signals(self.state["processes"][name]["stop"]))
        shutil.rmtree(self.folder, ignore_errors=True)

    def runs(self, name: str) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, KeyError):
            return not has_ended(self._process(name))
        return False

    def variables(self) -> dict[str, str]:
        """What leads matvlm, boto3, MLflow and Metaflow here."""
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "AWS_ENDPOINT_URL": self.endpoint,
            **KEYS,
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"s3://{BUCKET}/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    def _services(self) -> list[Service]:
        services = [store(self.folder, self.port + 1)]
        variables = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder}/mlflow.db"}
        if self.state["database"] == "postgres":
            services.insert(0, database(self.folder))
            variables = {"MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg2:///postgres", **services[0].variables}
        variables |= {"MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow", "MLFLOW_S3_ENDPOINT_URL": self.endpoint}
        variables |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [sys.executable, "-m", *words]
        return [*services, Service("mlflow", command, KEYS | variables, lambda: answers(f"{self.url}/health"))]

    def _start(self, service: Service) -> None:
        place, again = self.folder / f"{service.name}.log", service.name in self.state["processes"]
        with place.open("a") as log:
            process = subprocess.Popen(
                service.command,
                cwd=self.folder,
                env=os.environ | service.variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=service.user,
                group=service.user,
            )
        started = psutil.Process(process.pid).create_time()
        self.state["processes"][service.name] = {"pid": process.pid, "started": started, "stop": int(service.stop)}
        self._save()
        deadline = time.monotonic() + START_SECONDS
        while not service.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(place.read_text(errors="replace").splitlines()[-15:])
                raise StackError(f"{service.name} did not start; `make down` cleans up. The end of its log:\n{tail}")
            time.sleep(0.2)
        print(f"{service.name} runs{' again' + service.forgets if again else ''}", file=sys.stderr)

    def _make_bucket(self) -> None:
        import boto3

        keys = {name.lower(): value for name, value in KEYS.items() if name != "AWS_DEFAULT_REGION"}
        region = KEYS["AWS_DEFAULT_REGION"]
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name=region, **keys)
        if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)

    def _process(self, name: str) -> psutil.Process:
        """Of the recorded number and start, so that a number that was given away again is not taken for it."""
        recorded = self.state["processes"][name]
        process = psutil.Process(recorded["pid"])
        if abs(process.create_time() - recorded["started"]) > 0.1:
            raise psutil.NoSuchProcess(recorded["pid"])
        return process

    def _save(self) -> None:
        whole = self._place.with_suffix(".new")
        whole.write_text(json.dumps(self.state, indent=2))
        whole.replace(self._place)


def choose_database(folder: Path) -> tuple[str, str]:
    """ "postgres", initialised in ``folder``, or "sqlite"; and what to tell people."""
    initdb, data, user = postgres_program("initdb"), folder / "postgres", postgres_user()
    if initdb is None:
        return "sqlite", "SQLite, because Postgres is not installed (Debian's package: postgresql)"
    if user is None and os.geteuid() == 0:
        return "sqlite", "SQLite, because Postgres does not run as root, and there is no user postgres"
    if len(os.fsencode(data / ".s.PGSQL.5432")) > LONGEST_SOCKET_PATH:
        return "sqlite", f"SQLite, because {data} is too long a path for the socket of Postgres"
    data.mkdir(mode=0o700, exist_ok=True)
    if user:
        shutil.chown(data, user, user)
        if subprocess.run(["test", "-w", data], user=user, cwd="/").returncode:
            data.rmdir()
            return "sqlite", f"SQLite, because Postgres does not run as root, and its user may not enter {folder}"
    command = [initdb, "--pgdata", str(data), "--username", POSTGRES_USER, "--auth", "trust", "--encoding", "UTF8"]
    done = subprocess.run([*command, "--no-locale"], cwd="/", user=user, group=user, capture_output=True, text=True)
    if done.returncode:
        raise StackError(f"initdb failed in {data}; `make down` cleans up. It said:\n{done.stderr}")
    return "postgres", "Postgres"


def database(folder: Path) -> Service:
    """Postgres that listens on a socket in its own folder only, which nobody else may enter."""
    data = str(folder / "postgres")
    server, ask = postgres_program("postgres"), postgres_program("pg_isready")
    if server is None or ask is None:
        raise StackError(f"{folder} was made with Postgres, which is no longer installed; `make down` deletes it")
    return Service(
        name="postgres",
        command=[server, "-D", data, "-k", data, "-c", "listen_addresses="],
        variables={"PGHOST": data, "PGUSER": POSTGRES_USER},
        ready=lambda: subprocess.run([ask, "--quiet", "--host", data]).returncode == 0,
        user=postgres_user(),
        stop=signal.SIGINT,  # with open connections it would wait for their end
    )


def store(folder: Path, port: int) -> Service:
    """MinIO with its objects in ``folder``, or moto with its objects in memory."""
    command, variables = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], {}
    if minio := shutil.which("minio"):
        command = [minio, "server", str(folder / "s3"), "--address", f"127.0.0.1:{port}"]
        variables = {"MINIO_ROOT_USER": KEYS["AWS_ACCESS_KEY_ID"], "MINIO_ROOT_PASSWORD": KEYS["AWS_SECRET_ACCESS_KEY"]}
    forgets = "" if minio else "; its objects were in memory and are gone"
    return Service("s3", command, variables, lambda: answers(f"http://127.0.0.1:{port}/"), forgets=forgets)


def postgres_program(name: str) -> str | None:
    """Debian keeps the programs of each version out of PATH: the newest that is installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def postgres_user() -> str | None:
    """User and group of Postgres where root starts it, if there is such a user; else None: whoever starts it."""
    known = any(entry.pw_name == "postgres" for entry in pwd.getpwall())
    return "postgres" if os.geteuid() == 0 and known else None


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def answers(url: str) -> bool:
    """Whether a server gives any answer of HTTP, an error included."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError as error:
        return isinstance(error, urllib.error.HTTPError)
    return True


def has_ended(process: psutil.Process) -> bool:
    """Also of one whose parent has not taken note of its end."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def stop(process: psutil.Process, how: signal.Signals) -> None:
    """End ``process`` and what it started: politely, after ``STOP_SECONDS`` by force."""
    family = [process, *process.children(recursive=True)]
    process.send_signal(how)
    deadline = time.monotonic() + STOP_SECONDS
    while not all(map(has_ended, family)):
        if time.monotonic() > deadline:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        time.sleep(0.05)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["up", "url", "down"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the services keep what they keep")
    parser.add_argument("--port", type=int, default=5000, help="of MLflow; the S3 store gets the next one")
    options = parser.parse_args(words)
    stack = Stack(options.folder, options.port)
    if options.command == "url":
        print(f"MLflow's pages: {stack.url}" if stack.runs("mlflow") else "`make up` has not started a server")
        return 0 if stack.runs("mlflow") else 1
    if options.command == "down":
        stack.down()
        print("Nothing runs, and nothing is left of what ran", file=sys.stderr)
        return 0
    try:
        stack.up()
    except StackError as error:
        sys.exit(str(error))
    place = stack.folder / "env"
    print(f"{place.read_text()}\n# In this shell: source {place}\n# `make down` deletes all that is kept there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
