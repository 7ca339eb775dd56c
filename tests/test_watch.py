"""The watcher: every checkpoint is evaluated exactly once, whoever is killed, restarted or running beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from flow_tools import DEBUG, ROOT

from matvlm.storage import write_bytes
from matvlm.tracking import Tracker, TrackingError
from matvlm.tracking.store import open_client
from matvlm.watch import Folder, RegisteredModel, Watcher
from matvlm.watch.claims import LOST_AFTER, Claims
from matvlm.watch.sources import Source

EVALUATE = "sh -c 'echo {checkpoint} >> started; sleep SECONDS; echo {checkpoint} >> ended'"


class Watching:
    """``python -m matvlm watch`` in a process of its own."""

    def __init__(self, folder: Path, *words: str, seconds: float = 0.4, **variables: str):
        run = EVALUATE.replace("SECONDS", str(seconds))
        command = [sys.executable, "-m", "matvlm", "watch", str(DEBUG), "--every", "1", "--run", run, *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill(self, whole: bool = False) -> None:
        """SIGKILL to the watcher; with ``whole`` to what it runs too, as when the machine goes down."""
        running = psutil.Process(self.process.pid).children(recursive=True) if whole else []
        self.process.kill()
        for process in running:
            process.kill()
        self.process.wait()
        psutil.wait_procs(running, timeout=20)

    def output(self) -> str:
        return self.process.communicate(timeout=120)[0]


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def register(folder: Path, numbers: range) -> list[str]:
    tracker = Tracker("TrainFlow/1", folder / "runs" / "1", "matvlm")
    return [f"models:/matvlm/{tracker.register('matvlm', f's3://bucket/{one}', 'student', {})}" for one in numbers]


def test_a_burst_is_evaluated_exactly_once_through_kills_and_restarts(folder: Path) -> None:
    checkpoints = register(folder, range(3))
    started, ended = folder / "started", folder / "ended"
    watcher = Watching(folder, seconds=2)
    wait_until(lambda: len(lines(started)) == 1)
    watcher.kill()  # the first evaluation goes on without it
    checkpoints += register(folder, range(3, 5))
    watcher = Watching(folder, seconds=20)
    wait_until(lambda: len(lines(started)) == 2)
    watcher.kill(whole=True)  # the second one is lost in its middle
    assert lines(ended) == checkpoints[:1]
    watcher = Watching(folder)
    wait_until(lambda: len(lines(ended)) >= 3)
    watcher.kill()  # between two, or with the fourth just begun
    output = Watching(folder, "--once").output()
    assert "Traceback" not in output
    assert lines(ended) == checkpoints
    assert Counter(lines(started)) == Counter(checkpoints) + Counter([checkpoints[1]])
    client = open_client(f"sqlite:///{folder / 'mlflow.db'}")
    for version in client.search_model_versions("name = 'matvlm'"):
        assert version.tags["watch.debug"].startswith("done, ")
    assert Watching(folder, "--once").output().splitlines()[1:] == []


def test_two_watchers_share_a_burst(folder: Path) -> None:
    """On two machines, as each has a folder of runs of its own."""
    checkpoints = register(folder, range(5))
    both = [Watching(folder, "--once", seconds=0.1, MATVLM_RUNS=str(folder / name)) for name in ("here", "there")]
    outputs = [watcher.output() for watcher in both]
    assert [watcher.process.returncode for watcher in both] == [0, 0], outputs
    # One looks once, so what the other one holds just then it leaves to it.
    assert Counter(lines(folder / "ended")) == Counter(checkpoints)


@pytest.fixture(params=["folder", "s3", "registry"])
def source(request: pytest.FixtureRequest, folder: Path) -> Iterator[Source]:
    """Three checkpoints."""
    if request.param == "registry":
        register(folder, range(3))
        yield RegisteredModel("matvlm")
        return
    uri = str(folder / "models") if request.param == "folder" else request.getfixturevalue("bucket") + "/models"
    for name in ("a", "b/c", "b/d"):
        write_bytes(f"{uri}/{name}/config.json", b"{}")
        write_bytes(f"{uri}/{name}/model.safetensors", b"weights")
    write_bytes(f"{uri}/notes/readme.md", b"no model")
    yield Folder(uri)


def test_checkpoints_are_found_and_marked(source: Source) -> None:
    found = source.found()
    assert len(found) == 3
    names = [checkpoint.removeprefix(f"{source.name}/") for checkpoint in found]
    assert names in (["a", "b/c", "b/d"], ["models:/matvlm/1", "models:/matvlm/2", "models:/matvlm/3"])
    first, second, _ = found
    before = source.marks(first)
    source.mark(first, "watch.x", "one")
    source.mark(first, "watch.x", "two words")
    source.mark(second, "watch.y.z", "three")
    assert source.marks(first) == before | {"watch.x": "two words"}
    assert [keys - set(before) for keys in source.found().values()] == [{"watch.x"}, {"watch.y.z"}, set()]
    for _ in range(2):
        source.unmark(first, "watch.x")
    assert source.marks(first) == before


def test_a_folder_that_is_a_checkpoint_itself_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    source = Folder(f"{tmp_path}/")
    source.mark(str(tmp_path), "watch.x", "done")
    assert source.found() == {str(tmp_path): {"watch.x"}}
    assert source.marks(str(tmp_path)) == {"watch.x": "done"}
    assert Folder(str(tmp_path / "not" / "there")).found() == {}


def test_of_many_at_once_one_gets_the_claim(source: Source) -> None:
    together = threading.Barrier(6)
    taken: list[tuple[str, str]] = []
    checkpoints = list(source.found())

    def compete(name: str) -> None:
        claims = Claims(source, "debug", name)
        for checkpoint in checkpoints:
            together.wait()
            if claims.take(checkpoint):
                taken.append((checkpoint, name))
                others = [key for key in source.marks(checkpoint) if key.startswith("watch.") and name not in key]
                assert all(key.startswith("watch.debug.") for key in others)
            together.wait()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(compete, [f"place{number}" for number in range(6)]))
    assert [checkpoint for checkpoint, _ in taken] == checkpoints


def test_a_claim_is_kept_until_it_is_a_day_old(source: Source, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = next(iter(source.found()))
    ours, theirs = Claims(source, "debug", "ours"), Claims(source, "debug", "theirs")
    other_recipe = Claims(source, "full", "theirs")
    assert theirs.take(checkpoint)
    assert not ours.take(checkpoint)
    assert theirs.take(checkpoint), "a watcher may take again what it has"
    assert other_recipe.take(checkpoint)
    old = datetime.now(UTC) - LOST_AFTER - timedelta(minutes=1)
    source.mark(checkpoint, "watch.debug.theirs", f"{old.isoformat()} on a machine that is gone")
    assert ours.take(checkpoint)
    assert "too old to be alive" in caplog.text
    ours.finish(checkpoint, "done")
    assert checkpoint not in ours.new()
    assert not theirs.take(checkpoint)
    assert checkpoint in other_recipe.new()


def words(script: str) -> Callable[[str], list[str]]:
    return lambda checkpoint: ["sh", "-c", script, "evaluate", checkpoint]


def test_every_source_is_watched_alike(source: Source, folder: Path) -> None:
    checkpoints = list(source.found())
    place = folder / "place"
    for _ in range(2):
        assert Watcher(source, "debug", words('echo "$1" >> ended'), place, print).once() == []
    assert lines(folder / "ended") == checkpoints
    assert list(source.found()) == checkpoints, "marks are no checkpoints"
    assert Watcher(source, "full", words('echo "$1" >> again'), place, print).once() == []
    assert lines(folder / "again") == checkpoints


def test_a_failure_is_told_and_tried_again_only_when_asked(folder: Path) -> None:
    register(folder, range(2))
    said: list[str] = []
    script = 'echo "$1" >> tried; test -e fixed || { echo no images; exit 3; }'
    watcher = Watcher(RegisteredModel("matvlm"), "debug", words(script), folder / "place", said.append)
    assert watcher.once() == ["models:/matvlm/1", "models:/matvlm/2"]
    assert "models:/matvlm/1: failed with exit status 3: no images" in said
    (folder / "fixed").touch()
    assert watcher.once() == []
    assert len(lines(folder / "tried")) == 2
    assert watcher.once(retry=True) == []
    assert lines(folder / "tried") == ["models:/matvlm/1", "models:/matvlm/2"] * 2


def test_a_result_is_not_lost_while_the_registry_is_away(folder: Path) -> None:
    register(folder, range(1))
    database, away = folder / "mlflow.db", folder / "away.db"
    script = "echo x >> ended; mv mlflow.db away.db; mkdir mlflow.db"
    source = RegisteredModel("matvlm")
    with pytest.raises(TrackingError):
        Watcher(source, "debug", words(script), folder / "place", print).once()
    database.rmdir()
    away.rename(database)
    assert Watcher(source, "debug", words(script), folder / "place", print).once() == []
    assert lines(folder / "ended") == ["x"]
    assert Claims(source, "debug", "anyone").new() == []


def test_ctrl_c_ends_the_evaluation_which_is_done_again_later(folder: Path) -> None:
    register(folder, range(1))
    watcher = Watching(folder, seconds=60)
    wait_until(lambda: len(lines(folder / "started")) == 1)
    (wrapper,) = psutil.Process(watcher.process.pid).children()
    family = [wrapper, *wrapper.children(recursive=True)]
    watcher.process.send_signal(signal.SIGINT)
    assert watcher.process.wait(30) == 130
    assert psutil.wait_procs(family, timeout=20)[1] == []
    assert lines(folder / "ended") == []
    Watching(folder, "--once", seconds=0).output()
    assert lines(folder / "ended") == ["models:/matvlm/1"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--run", "evaluate"], "say where the checkpoint goes, by {checkpoint}"),
        (["--run", "sh -c '{checkpoint}"], "No closing quotation"),
        (["--once", "--folder", "s3://"], "expected s3://bucket/key"),
        (["--set", "promote.max_mean_drop=200"], "promote.max_mean_drop: Input should be less than or equal to 100"),
    ],
)
def test_what_a_user_got_wrong_is_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    from matvlm.cli import main

    assert main(["watch", str(DEBUG), *arguments]) == 1
    assert complaint in capsys.readouterr().err
