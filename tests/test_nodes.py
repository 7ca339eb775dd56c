"""One distillation on several nodes: launchers on loopback that have nothing in common but a port and an S3 server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed_cases import Heard, job_of
from s3_server import empty_bucket, serve
from test_distributed import alone, assert_same_curve, assert_same_model, environment
from tiny_distill import Stage, make_stage

from matvlm.config import Resources
from matvlm.distill import DistillError
from matvlm.distill.job import DistillJob, read_job
from matvlm.distill.launch import run
from matvlm.processes import Nodes, ProcessError, nodes
from matvlm.processes.nodes import Meeting
from matvlm.snapshots import NAME, RECORD
from matvlm.storage import join, list_files, write_json

SECONDS = 20
"""In which a node has ended after another one was lost; measured: 0.6 if a process of it was, 7 if its launcher was."""


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on(index: int, port: int, count: int = 2) -> Nodes:
    return Nodes(index, count, "127.0.0.1", port)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [tmp_path_factory.mktemp(f"node{index}") for index in range(2)]


@pytest.fixture(scope="module")
def stages(places: list[Path]) -> list[Stage]:
    """What each node has of its own, the same to the bit and each at a place of its own."""
    return [make_stage(place / "inputs") for place in places]


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    with serve() as endpoint, empty_bucket(endpoint, tmp_path / "cache") as uri:
        yield uri


def jobs_of(stages: list[Stage], folders: list[Path], processes: int = 1, **distill: Any) -> list[DistillJob]:
    jobs = []
    for stage, folder in zip(stages, folders, strict=True):
        recipe = stage.but(**distill).model_copy(update={"resources": Resources(processes=processes)})
        jobs.append(job_of(stage._replace(recipe=recipe), folder))
    return jobs


class OtherNode:
    """Node 1, launched in a process of its own, which prints its result or error as it ends; it reports nothing."""

    def __init__(self, job: DistillJob, port: int):
        given = job.folder.with_suffix(".json")
        write_json(given, job.model_dump(mode="json"))
        program = f"import test_nodes; test_nodes.be_node_1({str(given)!r}, {port})"
        self.process = subprocess.Popen([sys.executable, "-c", program], env=environment(), stdout=subprocess.PIPE)

    def kill_process(self) -> None:
        """The last rank of the run."""
        workers = [child for child in psutil.Process(self.process.pid).children() if "distill" in child.cmdline()]
        max(workers, key=lambda child: int(child.environ()["RANK"])).kill()

    def ended(self) -> Any:
        """What it said; None if it was killed."""
        said, _ = self.process.communicate(timeout=SECONDS)
        return json.loads(said.splitlines()[-1]) if said else None


def be_node_1(job: str, port: int) -> None:
    heard = Heard()
    try:
        result = run(read_job(Path(job)), heard, "cpu", on(1, port))
        said = f"{result}, heard {len(heard.seen)}"
    except DistillError as error:
        said = str(error)
    print(json.dumps(said))


def newest_snapshot(bucket: str, folder: Path) -> int:
    found = [NAME.fullmatch(name) for name in list_files(join(bucket, *folder.parts[-3:]))]
    return max((int(match[1]) for match in found if match and match[2] == RECORD), default=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_killed_and_continued(stages: list[Stage], places: list[Path], bucket: str, tmp_path: Path) -> None:
    """A process is lost, then a launcher is; twice as many processes, all new but for S3, come to what one comes to."""
    heard: list[Heard] = []

    def attempt(name: str, processes: int, lose: Callable[[OtherNode], None] | None = None) -> tuple[Path, Any, Any]:
        """Node 0's folder, what it raised or returned, and what node 1 said; 2 updates are made before the loss."""
        folders = [place / name / f"runs/distill/of-node{index}" for index, place in enumerate(places)]
        folders[1] = folders[1].with_name(f"{name}-{folders[1].name}")  # so another place for snapshots, if it had any
        fields = {"epochs": 5, "checkpoint_every_updates": 1, "snapshots": bucket}
        jobs, port = jobs_of(stages, folders, processes, **fields), free_port()
        other, lost_at = OtherNode(jobs[1], port), [0.0]

        def lose_now() -> None:
            lost_at[0] = time.monotonic()
            if lose:
                lose(other)

        heard.append(Heard(2, lose_now))
        try:
            outcome: Any = run(jobs[0], heard[-1], "cpu", on(0, port))
        except DistillError as error:
            outcome = str(error)
            assert time.monotonic() - lost_at[0] < SECONDS
        said = other.ended()
        assert [path.name for path in folders[1].iterdir()] == ["job.json"]
        return folders[0], outcome, said

    folder, error, said = attempt("first", 1, OtherNode.kill_process)
    start = rf"rank 1 of 2 \(pid \d+ on {re.escape(socket.gethostname())}\) ended with SIGKILL: killed from outside"
    assert re.match(f"node 1 of 2 failed: {start}.* resuming continues from the last snapshot", error)
    assert re.match(start, said)

    begun = newest_snapshot(bucket, folder)
    folder, error, said = attempt("second", 1, lambda other: other.process.kill())
    assert heard[1].computed[0] == begun + 1 > 2
    assert error.startswith("node 1 of 2 was killed or is out of reach: nothing was heard of it for ")
    assert said is None

    begun = newest_snapshot(bucket, folder)
    folder, result, said = attempt("third", 2)
    assert heard[2].computed == [*range(begun + 1, 16)]
    assert begun > heard[1].computed[0]
    assert (heard[2].done, heard[2].artifacts, said) == ((15, 15), ["loss_curves.png"], "None, heard 0")
    assert (result.uri, result.updates) == (str(folder / "model"), 15)
    whole = alone(stages[0], tmp_path / "whole", stages[0].but(epochs=5))
    assert_same_curve(heard[2].seen, whole.seen)
    assert_same_model(folder, tmp_path / "whole")

    again = attempt("third", 1)
    assert (again, heard[3].computed) == ((folder, result, "None, heard 0"), []), "node 1 did not know, and may end"


def together(*calls: Callable[[], Any]) -> list[str]:
    """What each raised, all called at the same time; empty for nothing."""

    def told(call: Callable[[], Any]) -> str:
        try:
            call()
        except (ProcessError, DistillError, KeyboardInterrupt) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        return [*pool.map(told, calls)]


def test_as_many_processes_on_every_node(stages: list[Stage], tmp_path: Path) -> None:
    port = free_port()
    jobs = [jobs_of(stages, [tmp_path / "0", tmp_path / "1"], processes=number)[number - 1] for number in (1, 2)]
    errors = together(*(partial(run, job, Heard(), "cpu", on(index, port)) for index, job in enumerate(jobs)))
    assert errors[0] == errors[1]
    assert "(node 0 of 2 has 1, node 1 of 2 has 2): give each of them as many GPUs and the same resources" in errors[0]


def meet(nodes: Nodes, then: Callable[[Meeting], Any] = Meeting.finish) -> None:
    with Meeting(nodes, 1) as meeting:
        then(meeting)


def test_nodes_that_differ_in_how_many_they_are() -> None:
    port = free_port()
    errors = together(partial(meet, on(0, port)), partial(meet, on(1, port, 3)))
    assert all("(node 0 of 2 has 1, node 1 of 3 has 1)" in error for error in errors)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_SECONDS", 1.5)
    port = free_port()
    (error,) = together(partial(meet, on(1, port)))
    assert error.startswith(f"node 0 did not answer at 127.0.0.1:{port} in 1.5 s ([Errno 111] Connection refused): is")
    errors = together(partial(meet, on(0, port, 3)), partial(meet, on(2, port, 3)))
    assert errors[0].startswith(f"of the 3 nodes, 1 did not come to 127.0.0.1:{port} in 1.5 s: are all running")
    assert errors[0] == errors[1]


def test_a_stranger_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the port, and says nothing to anybody."""
    monkeypatch.setattr(nodes, "MEET_SECONDS", 1.5)
    monkeypatch.setattr(nodes, "WORD_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        errors = together(partial(meet, on(0, port)), partial(meet, on(1, port)))
    assert errors[0].startswith(f"node 0 of 2 cannot listen at port {port} (")
    assert errors[0].endswith("choose another one for all nodes")
    assert errors[1].startswith(f"node 0 did not answer at 127.0.0.1:{port} in 1.5 s (no answer)")


def test_two_of_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_SECONDS", 2.0)
    port = free_port()
    errors = together(*(partial(meet, on(index, port, 3)) for index in (0, 1, 1)))
    assert "2 did not come" in errors[0]
    assert sorted(errors[1:]) == sorted([errors[0], "node 1 of 3 is there already: two have that index"])


def test_every_node_ends_when_all_are_done() -> None:
    ended: list[int] = []

    def work(seconds: float, meeting: Meeting) -> None:
        time.sleep(seconds)
        ended.append(meeting.nodes.index)
        meeting.finish()
        assert sorted(ended) == [0, 1, 2]

    port = free_port()
    for index in range(2):  # the same port again at once, as another attempt would
        started = time.monotonic()
        ended.clear()
        nodes_of = [on(number, port, 3) for number in range(3)]
        calls = [partial(meet, each, partial(work, 1.0 * (each.index == index))) for each in nodes_of]
        assert together(*calls) == ["", "", ""]
        assert time.monotonic() - started < SECONDS / 2


def test_an_error_reaches_all_nodes_as_it_was() -> None:
    """Of the one that failed, not of those that heard of it; and an interrupt is one too."""

    def fail(error: BaseException, _: Meeting) -> None:
        raise error

    for error, told in ((ProcessError("rank 1 of 3 ended"), "rank 1 of 3 ended"), (KeyboardInterrupt(), "KeyboardInt")):
        port = free_port()
        calls = [
            partial(meet, on(index, port, 3), partial(fail, error) if index == 1 else Meeting.finish)
            for index in range(3)
        ]
        errors = together(*calls)
        assert errors[1] == str(error)
        assert errors[0] == errors[2]
        assert errors[0].startswith(f"node 1 of 3 failed: {told}")


@pytest.mark.parametrize(("index", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_node_that_goes_without_a_word(index: int, how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed, or stopped as one is whose network takes everything and gives nothing."""
    monkeypatch.setattr(nodes, "SILENCE_SECONDS", 2.0)
    monkeypatch.setattr(nodes, "WORD_SECONDS", 1.0)
    port = free_port()
    place = f"Nodes({index}, 2, '127.0.0.1', {port})"
    program = f"import time; from matvlm.processes.nodes import *; Meeting({place}, 1).__enter__(); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", program], env=environment())

    def lose(meeting: Meeting) -> None:
        other.send_signal(how)
        meeting.finish()

    started = time.monotonic()
    (error,) = together(partial(meet, on(1 - index, port), lose))
    other.kill()
    other.wait()
    assert error.startswith(f"node {index} of 2 was killed or is out of reach: ")
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"index": 2, "count": 2, "port": 20000}, "nodes.index 2: 2 nodes are 0 to 1"),
        ({"index": -1}, "nodes.index -1: 1 nodes are 0 to 0"),
        ({"count": 2}, "nodes.port 0: several nodes need one that all know, from 1 to 65535"),
        ({"count": 2, "port": 70000}, "nodes.port 70000"),
    ],
)
def test_nodes_that_cannot_be(fields: dict[str, int], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        Nodes(**fields)
