"""One command in several processes of a node: started, watched, and ended together, on all nodes of the run.

Each process is ``python -m matvlm COMMAND``, as torchrun would start it; torch's elastic package keeps them. There are
no restarts: whoever wants another try runs it again, and what is finished stays.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

import matvlm
from matvlm.config import Resources
from matvlm.processes.nodes import ONE_NODE, Meeting, Nodes, ProcessError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHER = "MATVLM_LAUNCHER"
"""Tells a process who has started it; torchrun does not need to."""
LOOK_SECONDS = 0.1
LOST_PEER = ("onnection closed by peer", "onnection reset by peer", "roken pipe", "remote process exited")
"""Of gloo and NCCL: says that another process has gone, so it is not this one's error."""


def num_processes(resources: Resources, device: str) -> int:
    """How many processes share a stage on this machine.

    Raises:
        ValueError: there are fewer GPUs than ``resources.processes``.
    """
    if not device.startswith("cuda"):
        return resources.processes or 1
    available = torch.cuda.device_count()
    if resources.processes and resources.processes > available:
        raise ValueError(f"resources.processes is {resources.processes}, and this machine has {available} GPUs")
    return resources.processes or max(1, min(resources.gpu, available))


def end_with_launcher() -> None:
    """Let this process end at once when the one that has started it, for a run of several, is gone in whatever way."""
    if LAUNCHER not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def run(arguments: Sequence[str], count: int, look: Callable[[], None] = lambda: None, nodes: Nodes = ONE_NODE) -> None:
    """``python -m matvlm ARGUMENTS`` in ``count`` processes of this node, until those of all ``nodes`` have ended.

    ``look`` is called now and then.

    Raises:
        ProcessError: a process failed or was killed, on whichever node; the others were stopped. Or the nodes cannot
            find each other, or do not have as many processes.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    with Meeting(nodes, count) as meeting, TemporaryDirectory() as errors:
        with _signals_kept():
            processes = start_processes(
                arguments[0],
                sys.executable,
                dict.fromkeys(range(count), ("-m", "matvlm", *arguments)),
                {local: _environment(local, count, meeting) for local in range(count)},
                DefaultLogsSpecs(log_dir=errors),
            )
        try:
            while (result := processes.wait(0)) is None:
                look()
                meeting.check()
                time.sleep(LOOK_SECONDS)
        finally:
            processes.close()
        look()
        if result.is_failed():
            if all(_guilt(failure) > 1 for failure in result.failures.values()):
                meeting.hear_why()
            raise ProcessError(explain(result.failures.values(), count, nodes))
        meeting.finish()


def _environment(local: int, count: int, meeting: Meeting) -> dict[str, str]:
    package = str(Path(matvlm.__file__).parents[1])
    return {
        "RANK": str(meeting.nodes.index * count + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(count * meeting.nodes.count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        LAUNCHER: str(os.getpid()),
    }


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The elastic package takes four signals over; here Ctrl-C goes on to be a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def explain(failures: Iterable[ProcessFailure], count: int, nodes: Nodes = ONE_NODE) -> str:
    """What happened to the one of a node's ``count`` processes that the others only followed."""
    first = min(failures, key=_guilt)
    rank = nodes.index * count + first.local_rank
    killed = first.exitcode < 0
    why = _message(first) or ("killed from outside" if killed else "it said no more than what is printed above")
    if first.exitcode == -signal.SIGKILL:
        why += ", by hand or because memory ran out"
    return (
        f"rank {rank} of {count * nodes.count} (pid {first.pid} on {socket.gethostname()}) ended with "
        f"{first.signal_name() if killed else f'exit code {first.exitcode}'}: {why}. The others were stopped"
    )


def _guilt(failure: ProcessFailure) -> int:
    """Least of who failed first: those stopped because of it, or left without it, come after."""
    message = _message(failure)
    if any(words in message for words in LOST_PEER):
        return 2
    if message:
        return 1
    return 3 if failure.exitcode == -signal.SIGTERM else 0


def _message(failure: ProcessFailure) -> str:
    """What its error file says, if it has written one."""
    return str(failure.message["message"]) if isinstance(failure.message, Mapping) else ""
