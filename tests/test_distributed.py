"""Several processes, one distillation: what one process computes, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from distributed_cases import SAME, SMALL, VALIDATED, Heard, breaking, ids_of, job_of, lenient, lost_image
from flow_tools import WITH_DEBUG, Store, finished_run, run_flow, run_folder
from safetensors.torch import load_file
from tiny_distill import NUM_SAMPLES, Stage, make_stage
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from matvlm.config import Resources
from matvlm.data.encoding import Encoder
from matvlm.data.prepare import open_dataset
from matvlm.distill import DistillError
from matvlm.distill.feed import Feed, Share
from matvlm.distill.job import DistillJob, read_job
from matvlm.distill.launch import run
from matvlm.distill.schedule import order
from matvlm.models import locate
from matvlm.processes import explain, num_processes
from matvlm.storage import write_json
from matvlm.world import World

HERE = Path(__file__).resolve().parent
RTOL, ATOL = 1e-4, 3e-5
"""Of losses and gradient norms, and of weights; measured: 2e-6 after 6 updates and 3e-5 after 30, and 8e-6."""
SECONDS = 10
"""In which a run has ended after one of its processes was lost; measured: 0.3."""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module")
def two(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done every one of the cases."""
    folder = tmp_path_factory.mktemp("two")
    write_json(folder / "job.json", job_of(stage, folder).model_dump(mode="json"))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(stage.recipe.model_dump(mode="json")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(HERE / "distributed_cases.py"), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    (folder / "output.txt").write_text(done.stdout)
    return folder


def seen(two: Path, case: str) -> dict[str, Any]:
    """What the first process saw; the second one reports nothing, but ends in the same way."""
    ours, theirs = (json.loads((two / f"seen-{rank}.json").read_text())[case] for rank in (0, 1))
    assert ours.get("error") == theirs.get("error")
    assert not theirs.get("seen")
    return dict(ours)


def alone(stage: Stage, folder: Path, recipe: Any = None) -> Heard:
    heard = Heard()
    stage.run(folder, heard, recipe=recipe)
    return heard


@pytest.fixture(scope="module")
def one(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Heard]:
    folder = tmp_path_factory.mktemp("one")
    return folder, alone(stage, folder)


def assert_same_curve(found: dict[Any, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert [int(update) for update in found] == list(expected)
    for mine, theirs in zip(found.values(), expected.values(), strict=True):
        assert mine == pytest.approx(theirs, rel=RTOL)


def assert_same_model(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=ATOL, rtol=0, msg=name)


@pytest.mark.parametrize("case", SAME)
def test_two_processes_compute_what_one_does(two: Path, one: tuple[Path, Heard], case: str) -> None:
    """Three samples in the last batch of an epoch: two for the first process, one for the second."""
    assert_same_curve(seen(two, case)["seen"], one[1].seen)
    assert_same_model(two / case, one[0])


def test_the_command_alone_makes_what_is_missing(two: Path, one: tuple[Path, Heard]) -> None:
    """The first process prepares, both distil: from a recipe to the same student."""
    assert_same_model(two / "command", one[0])
    assert (two / "output.txt").read_text().splitlines()[-1].startswith(f"{two}/command/model: 6 updates, ")
    kinds = [json.loads(line)[0] for line in (two / "command" / "events.jsonl").read_text().splitlines()]
    assert kinds.count("metrics") == 6
    assert read_job(two / "command" / "job.json").student.layers == [0, 2]


def test_a_batch_smaller_than_the_world(stage: Stage, two: Path, tmp_path: Path) -> None:
    """Of the last batch one process has nothing, also where a continued run begins with it."""
    expected = alone(stage, tmp_path, stage.but(**SMALL))
    for case, computed in (("small", [1, 2, 3, 4, 5, 6]), ("small, continued", [3, 4, 5, 6])):
        assert_same_curve(seen(two, case)["seen"], expected.seen)
        assert seen(two, case)["computed"] == computed
        assert_same_model(two / case, tmp_path)


def test_a_process_with_nothing_to_validate_on(stage: Stage, two: Path, tmp_path: Path) -> None:
    expected = alone(stage, tmp_path, stage.but(**VALIDATED))
    assert list(expected.validated) == [0, 2, 4, 6]
    assert_same_curve(seen(two, "validated")["validated"], expected.validated)
    assert_same_model(two / "validated", tmp_path)


def test_processes_need_no_folder_in_common(two: Path) -> None:
    """What is there already, a student or a snapshot, is the first one's to know; only inputs must be the same."""
    assert not (two / "second").exists()
    assert seen(two, "finished") == {"seen": {}, "lost": {}, "computed": [], "validated": {}}
    assert seen(two, "different")["error"].startswith(
        "seed is 4 for rank 1 and 3 for rank 0: every node needs the same"
    )


def test_an_update_broken_in_one_process_is_skipped_in_both(
    stage: Stage, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "collate", breaking(stage))
    expected, found = alone(stage, tmp_path), seen(two, "broken")
    assert "loss" not in expected.seen[2]
    assert expected.lost[6] == [2, 0]
    assert [*found["lost"].values()] == [*expected.lost.values()]
    assert_same_curve(found["seen"], expected.seen)
    assert_same_model(two / "broken", tmp_path)
    named = re.search(r"allows 0\): update 2 on (.*); in the last one, the loss", seen(two, "broken, strict")["error"])
    assert named is not None
    assert named[1].split(", ") == ids_of(stage, 2)[1::2], "the two samples of the second process"


def test_an_image_gone_in_one_process(stage: Stage, two: Path, tmp_path: Path) -> None:
    picture, hidden = lost_image(stage), tmp_path / "hidden.png"
    picture.rename(hidden)
    expected = alone(stage, tmp_path / "run", lenient(stage))
    hidden.rename(picture)
    found = seen(two, "image lost")
    assert expected.lost[1] == [0, 1]
    assert [*found["lost"].values()] == [*expected.lost.values()]
    assert_same_curve(found["seen"], expected.seen)
    assert_same_model(two / "image lost", tmp_path / "run")
    error = seen(two, "too many lost")["error"]
    assert error.startswith("update 1: 1 samples cannot be loaded any more")
    assert str(picture) in error


def ids_in(share: Share) -> list[str]:
    return [id for group in share.groups[: share.counted] for part in group.parts for id in part.ids]


@pytest.mark.parametrize("batch_size", [4, 5])
@pytest.mark.parametrize("sizes", [[2, 1, 2], [3, 1], [11, 2]], ids=str)
def test_no_sample_is_lost_or_repeated_as_processes_come_and_go(
    stage: Stage, sizes: list[int], batch_size: int
) -> None:
    """Each ``size`` makes two updates and then the next continues."""
    recipe, dataset = stage.but(batch_size=batch_size, micro_batch_size=1), open_dataset(stage.data)
    encoder = Encoder(locate.load(stage.teacher.uri)[1])
    for number, size in enumerate(sizes):
        first = 1 + 2 * number
        feeds = [Feed(recipe, dataset, encoder, World(rank, size)).shares(first, first + 1) for rank in range(size)]
        for update in (first, first + 1):
            shares = [next(feed) for feed in feeds]
            expected = [dataset[row]["id"] for row in order(NUM_SAMPLES, batch_size, recipe.seed, update)]
            assert sorted(id for share in shares for id in ids_in(share)) == sorted(expected)
            assert all(share.groups for share in shares)


def long(stage: Stage, folder: Path) -> DistillJob:
    """Updates enough to be interrupted in the middle of them, in two processes."""
    recipe = stage.but(epochs=10, checkpoint_every_updates=1)
    recipe = recipe.model_copy(update={"resources": Resources(processes=2)})
    return job_of(stage._replace(recipe=recipe), folder)


def end_of_all() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def launch_and_die(job: str) -> None:
    run(read_job(Path(job)), Heard(2, end_of_all), "cpu")


def ended(condition: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < SECONDS
        time.sleep(0.02)
    return time.monotonic() - started


def workers() -> list[psutil.Process]:
    """The processes of a distillation that this one has started, by rank; other tests' helpers may be beside them."""
    ours = [child for child in psutil.Process().children() if "distill" in child.cmdline()]
    return sorted(ours, key=lambda child: int(child.environ()["RANK"]))


def test_killed_continued_by_fewer_killed_and_continued(stage: Stage, tmp_path: Path) -> None:
    """Two processes of which all are killed, their starter first; one; two of which one is killed; two again."""
    job = long(stage, tmp_path / "run")
    whole = alone(stage, tmp_path / "whole", job.recipe)
    write_json(tmp_path / "given.json", job.model_dump(mode="json"))
    program = f"import test_distributed; test_distributed.launch_and_die({str(tmp_path / 'given.json')!r})"
    starter = subprocess.Popen([sys.executable, "-c", program], env=environment(), stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    while starter.poll() is None:
        children = psutil.Process(starter.pid).children() or children
        time.sleep(0.05)
    assert starter.returncode == -signal.SIGKILL
    assert len(children) == 2
    ended(lambda: not any(child.is_running() for child in children))

    def interrupt() -> None:
        raise KeyboardInterrupt

    fewer = Heard(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        job.run(fewer, "cpu")
    assert 1 < fewer.computed[0] < 30

    killed: list[psutil.Process] = []

    def kill_second() -> None:
        killed.append(workers()[1])
        killed[0].kill()
        killed_at.append(time.monotonic())

    killed_at: list[float] = []
    heard = Heard(2, kill_second)
    with pytest.raises(DistillError) as caught:
        run(job, heard, "cpu")
    assert time.monotonic() - killed_at[0] < SECONDS
    start = rf"rank 1 of 2 \(pid {killed[0].pid} on {re.escape(socket.gethostname())}\) ended with SIGKILL: killed from"
    assert re.match(f"{start} outside, by hand or because memory ran out. .* resuming continues", str(caught.value))
    assert workers() == []
    assert heard.computed[0] == fewer.computed[0] + 1 < 30

    last = Heard()
    result = run(job, last, "cpu")
    assert last.computed[0] > heard.computed[0]
    assert last.computed[-1] == result.updates == 30
    assert (last.artifacts, last.done) == (["loss_curves.png"], (30, 30))
    assert_same_curve(last.seen, whole.seen)
    assert_same_model(tmp_path / "run", tmp_path / "whole")
    assert run(job, Heard(), "cpu") == result, "which starts no process"


@pytest.mark.slow  # for a start of two processes; all else of it is tested below
def test_an_error_in_every_process_is_told_as_it_was_meant(stage: Stage, tmp_path: Path) -> None:
    job = job_of(stage._replace(recipe=long(stage, tmp_path).recipe), tmp_path / "run")
    gone = stage.data.model_copy(update={"uri": str(tmp_path / "gone")})
    with pytest.raises(
        DistillError, match=r"rank [01] of 2 \(pid \d+ on .*\) ended with exit code 1: DataError: .*gone"
    ):
        run(job.model_copy(update={"data": gone}), Heard(), "cpu")


LOST = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:37069"


@pytest.mark.parametrize(
    ("found", "blamed"),
    [
        ({0: (1, LOST), 1: (-signal.SIGKILL, "")}, 1),
        ({0: (-signal.SIGTERM, ""), 1: (1, "ValueError: bad")}, 1),
        ({0: (1, LOST), 1: (1, "ValueError: bad")}, 1),
        ({0: (1, LOST), 1: (-signal.SIGTERM, "ValueError: bad")}, 1),
        ({0: (-signal.SIGTERM, ""), 1: (-signal.SIGSEGV, "")}, 1),
        ({0: (-signal.SIGTERM, ""), 1: (2, "")}, 1),
        ({0: (1, "ValueError: bad"), 1: (1, "ValueError: bad")}, 0),
    ],
)
def test_the_first_to_fail_is_blamed(tmp_path: Path, found: dict[int, tuple[int, str]], blamed: int) -> None:
    failures = []
    for rank, (code, message) in found.items():
        place = tmp_path / f"{rank}.json"
        if message:
            extra = {"py_callstack": "", "timestamp": "0"}
            place.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        failures.append(ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(place)))
    code, message = found[blamed]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    told = explain(failures, 2)
    assert told.startswith(f"rank {blamed} of 2 (pid {100 + blamed} on {socket.gethostname()}) ended with {how}: ")
    assert message in told


def test_a_process_a_gpu_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [num_processes(Resources(gpu=gpus), "cuda") for gpus in (0, 1, 2, 4)] == [1, 1, 2, 2]
    assert [num_processes(Resources(gpu=4, processes=number), "cuda") for number in (1, 2)] == [1, 2]
    assert [num_processes(Resources(gpu=4, processes=number), "cpu") for number in (None, 3)] == [1, 3]
    with pytest.raises(ValueError, match=r"resources\.processes is 3, and this machine has 2 GPUs"):
        num_processes(Resources(processes=3), "cuda")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_flow_in_two_processes(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    code, output = run_flow(tmp_path, *WITH_DEBUG, "run", "--set", "resources.processes=2", "evaluate.limit=8")
    assert code == 0, output
    _, other = finished_run(tmp_path_factory.getbasetemp() / "finished")
    curves = []
    for folder in (tmp_path, other):
        store = Store(folder)
        distilled = store.runs(run_folder(folder).name)["distill[aligned]"]
        assert distilled.info.status == "FINISHED"
        curves.append(dict(store.curve(distilled, "loss")))
    assert list(curves[0]) == [1, 2, 3, 4, 5, 6]
    assert curves[0] == pytest.approx(curves[1], rel=RTOL)
