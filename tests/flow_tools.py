"""Runs the flows as a user does, each time in a folder of its own, and reads what they leave in MLflow."""

from __future__ import annotations

import base64
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from matvlm.distill.speed import PHASES

ROOT = Path(__file__).resolve().parents[1]
FLOWS = ROOT / "flows"
DEBUG = FLOWS / "recipes" / "debug.yaml"
WITH_DEBUG = ("--config", "recipe", str(DEBUG))
TIMED = {"samples_per_second", "tokens_per_second", "memory_gb", *(f"share_{phase}" for phase in PHASES)}
"""Metrics of a distillation that no two runs share."""


def environment(**extra: str) -> dict[str, str]:
    """That of a user with the virtual environment active and nothing configured, and ``extra``."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("METAFLOW_", "MLFLOW_", "MATVLM_"))
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{ours['PATH']}"
    return {**ours, "PATH": path, "METAFLOW_USER": "matvlm", "TOKENIZERS_PARALLELISM": "false", **extra}


class FlowProcess:
    """A flow started from the command line, as the leader of a process group of its own."""

    def __init__(self, folder: Path, *words: str, flow: str = "train_flow.py", log: str = "log.txt", **extra: str):
        self._log = folder / log
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(FLOWS / flow), *words],
                cwd=folder,
                env=environment(**extra),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(encoding="utf-8")

    def wait(self, seconds: float = 800) -> int:
        """Its exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def wait_until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Look every 10 ms, until ``condition`` holds."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"it did not come to this:\n{self.output}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once; returns when none is left."""
        try:
            family = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            return
        self.process.wait()
        _, alive = psutil.wait_procs(family[1:], timeout=20)
        assert alive == []


def run_flow(folder: Path, *words: str, **options: str) -> tuple[int, str]:
    """Exit status and output of a flow that is run to its end."""
    flow = FlowProcess(folder, *words, **options)
    return flow.wait(), flow.output


def resume_commands(output: str) -> list[list[str]]:
    """The words after the flow's file in each command, printed so far, that continues a run."""
    return [found.split() for found in re.findall(r"python flows/train_flow\.py (resume .*)", output)]


def run_folder(folder: Path) -> Path:
    """The files of the only run made in ``folder``."""
    (found,) = (folder / "runs").iterdir()
    return found


@dataclass(frozen=True)
class Store:
    """The MLflow store that runs in ``folder`` made."""

    folder: Path

    @functools.cached_property
    def client(self) -> Any:
        from mlflow.tracking import MlflowClient

        uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        return MlflowClient(uri, uri)

    def runs(self, run_key: str) -> dict[str, Any]:
        """The MLflow runs of one flow run by step, the parent as ''; each exists once."""
        experiment = self.client.get_experiment_by_name("matvlm")
        found = self.client.search_runs([experiment.experiment_id], f"tags.`matvlm.run_key` = '{run_key}'")
        by_step = {run.data.tags["matvlm.step"]: run for run in found}
        assert len(by_step) == len(found), [run.info.run_name for run in found]
        return by_step

    def curve(self, run: Any, metric: str) -> list[tuple[int, float]]:
        """Every point of ``metric``, in the order logged: (step, value)."""
        return [(point.step, point.value) for point in self.client.get_metric_history(run.info.run_id, metric)]

    def artifacts(self, run: Any, folder: str = "") -> set[str]:
        return {item.path for item in self.client.list_artifacts(run.info.run_id, folder)}

    def read(self, run: Any, artifact: str) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, artifact)).read_bytes()


def cards(folder: Path) -> dict[str, list[str]]:
    """What the cards of the runs in ``folder`` hold, as JSON text, by step."""
    found: dict[str, list[str]] = {}
    for page in sorted((folder / ".metaflow" / "mf.cards").glob("*/runs/*/steps/*/tasks/*/cards/*.html")):
        (content,) = re.findall(r"__MF_DATA__\[[^]]+\]\s*=\s*['\"]([\w+/=]+)['\"]", page.read_text(encoding="utf-8"))
        found.setdefault(page.parents[3].name, []).append(base64.b64decode(content).decode())
    return found


@functools.cache
def finished_run(folder: Path) -> tuple[Any, Path]:
    """The debug recipe through Metaflow's Runner, once per test session: the Runner's answer and the working folder."""
    from metaflow import Runner

    folder.mkdir()
    before = dict(os.environ)
    wanted = environment()
    os.environ.clear()
    os.environ.update(wanted)  # the Runner adds to the environment, and can take nothing out of it
    try:
        runner = Runner(
            str(FLOWS / "train_flow.py"), show_output=False, cwd=str(folder), config=[("recipe", str(DEBUG))]
        )
        return runner.run(max_workers=2), folder
    finally:
        os.environ.clear()
        os.environ.update(before)
