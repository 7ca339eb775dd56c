"""The machines of one run: how those who start its processes there find each other, and how they learn who failed.

Node 0's launcher holds torch's store, in which the processes meet too. In it every node has one word, which a thread of
its launcher writes anew every ``BEAT_SECONDS``, so that one that was killed, or is out of reach, is noticed by silence.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

import torch.distributed as dist

MEET_SECONDS = 1800.0
"""For all nodes to come: a cluster may have to make room for the last one, which then fetches its inputs."""
BEAT_SECONDS = 0.5
SILENCE_SECONDS = 30.0
"""After which a node counts as gone: long for a busy machine, short beside what a process waits for another one."""
WORD_SECONDS = 5.0
"""For a node to say why it failed, or to hear why another one did."""
LOCAL = "127.0.0.1"


class ProcessError(RuntimeError):
    """One of several processes failed or was killed; the message says which one, how, and its own error."""


@dataclass(frozen=True)
class Nodes:
    """The ``count`` machines that share a run, of which this is number ``index``; by default it is alone.

    ``address`` is node 0's, where all meet at ``port``; one machine alone takes any free port for 0.
    """

    index: int = 0
    count: int = 1
    address: str = LOCAL
    port: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"nodes.index {self.index}: {self.count} nodes are 0 to {self.count - 1}")
        if self.count > 1 and not 0 < self.port < 1 << 16:
            raise ValueError(f"nodes.port {self.port}: several nodes need one that all know, from 1 to {(1 << 16) - 1}")


ONE_NODE = Nodes()


class _NodeError(ProcessError):
    """What is wrong with the nodes or with another one of them, rather than with this one's processes."""


class _Word(NamedTuple):
    """What a node tells the others."""

    nodes: int
    processes: int
    state: str
    why: str = ""
    """Why it cannot go on: its own error, or the one it has heard of."""


class _Heard(NamedTuple):
    """The last word of a node; each has another ``beat``. ``when``: in seconds of this machine's own clock."""

    word: _Word
    beat: int
    when: float


WORKS, DONE, LEFT = "works", "done", "left"


class Meeting:
    """All nodes of a run while it lasts, for the launcher of each. Entering waits until all are there.

    Only the thread talks to the store: a network that swallows all does not stop a launcher from noticing it. A node
    that leaves by an error tells the others; node 0, whose store ends with it, stays a moment longer than they do.
    """

    def __init__(self, nodes: Nodes, processes: int):
        """``processes``: on this node.

        Raises:
            ProcessError: the port is taken on this machine, which is node 0.
        """
        self.nodes, self.port = nodes, nodes.port
        self._store: dist.TCPStore | None = None  # type: ignore[name-defined]
        if nodes.index == 0:
            self._store = _new_store(nodes)
            self.port = self._store.port
        self._word = _Word(nodes.count, processes, WORKS)
        self._said: _Word | None = None
        self._heard: dict[int, _Heard] = {}
        self._refused, self._problem = "no answer", ""
        self._beat, self._changed, self._over = 0, threading.Event(), False
        self._thread = threading.Thread(target=self._talk, name="nodes", daemon=True)

    @property
    def address(self) -> str:
        """Of the store, for processes of this node."""
        return LOCAL if self.nodes.index == 0 else self.nodes.address

    def __enter__(self) -> Self:
        """Wait for the others.

        Raises:
            ProcessError: a node is missing or there twice, has failed, or has another number of nodes or processes.
        """
        if self.nodes.count > 1:
            self._thread.start()
            try:
                self._gather()
            except BaseException as error:
                self._leave(error)
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.nodes.count > 1:
            self._leave(error)

    def check(self, silence: float | None = None) -> None:
        """Look whether the others go on.

        Args:
            silence: of so many seconds means that a node has gone; None is ``SILENCE_SECONDS``.

        Raises:
            ProcessError: another node has failed, or has gone.
        """
        self._raise_why()
        if self._problem:
            raise _NodeError(self._problem)
        for index, (word, _, when) in self._all_heard().items():
            if word.state != LEFT and (silent := time.monotonic() - when) > (silence or SILENCE_SECONDS):
                raise _NodeError(
                    f"node {index} of {self.nodes.count} was killed or is out of reach: nothing was heard of it for "
                    f"{silent:.0f} s"
                )

    def hear_why(self) -> None:
        """For a node that lost another one's process: give that node the time to say what happened, and ``check``."""
        until = time.monotonic() + WORD_SECONDS * (self.nodes.count > 1)
        while time.monotonic() < until:
            self.check()
            time.sleep(BEAT_SECONDS / 5)
        self.check(WORD_SECONDS / 2)

    def finish(self) -> None:
        """Wait until all nodes are as far as this one, which has done its part.

        Raises:
            ProcessError: another one failed.
        """
        if self.nodes.count > 1:
            self._say(self._word._replace(state=DONE))
        while any(heard.word.state == WORKS for heard in self._all_heard().values()):
            self.check()
            time.sleep(BEAT_SECONDS / 5)
        self._raise_why()  # of one that had left before this one looked

    def _raise_why(self) -> None:
        """The error that another node has told of, if one has."""
        for word, _, _ in self._all_heard().values():
            if word.why:
                raise _NodeError(word.why)

    def _gather(self) -> None:
        until = time.monotonic() + MEET_SECONDS
        while len(self._heard) < self.nodes.count - 1:
            self.check()
            if time.monotonic() > until:
                raise _NodeError(self._missing())
            time.sleep(BEAT_SECONDS / 5)
        self.check()
        words = {self.nodes.index: self._word} | {index: heard.word for index, heard in self._all_heard().items()}
        if len({word[:2] for word in words.values()}) > 1:
            found = [f"node {index} of {word.nodes} has {word.processes}" for index, word in sorted(words.items())]
            raise _NodeError(
                f"the nodes differ in how many they are or in their processes ({', '.join(found)}): give each of them "
                "as many GPUs and the same resources.processes"
            )

    def _missing(self) -> str:
        place = f"{self.nodes.address}:{self.nodes.port}"
        if self._store is None:
            return (
                f"node 0 did not answer at {place} in {MEET_SECONDS:g} s ({self._refused}): is it running, is that its "
                "address, and may this machine connect to that port?"
            )
        missing = sorted({*range(self.nodes.count)} - {self.nodes.index, *self._heard})
        return (
            f"of the {self.nodes.count} nodes, {', '.join(map(str, missing))} did not come to {place} in "
            f"{MEET_SECONDS:g} s: are all running, and can they connect to that port?"
        )

    def _all_heard(self) -> dict[int, _Heard]:
        """By node; a copy, as the thread goes on."""
        return dict(sorted(self._heard.copy().items()))

    def _leave(self, error: BaseException | None) -> None:
        why = ""
        if isinstance(error, _NodeError):
            why = str(error)
        elif error is not None:
            own = str(error) if isinstance(error, ProcessError) else f"{type(error).__name__} {error}".strip()
            why = f"node {self.nodes.index} of {self.nodes.count} failed: {own}"
        self._say(self._word._replace(state=LEFT, why=why))
        until = time.monotonic() + WORD_SECONDS * (self.nodes.index == 0)
        while self._others_listen() and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 5)
        self._over = True
        self._changed.set()
        self._thread.join(WORD_SECONDS)

    def _others_listen(self) -> bool:
        """Whether one of them lives and has not left."""
        since = time.monotonic() - WORD_SECONDS / 2
        return any(word.state != LEFT and when > since for word, _, when in self._all_heard().values())

    def _say(self, word: _Word) -> None:
        """Let the others know, if the store can be reached."""
        self._word = word
        self._changed.set()
        until = time.monotonic() + WORD_SECONDS
        while self._said != word and self._store and not self._problem and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 50)

    def _talk(self) -> None:
        """The thread: find the store, then say and hear, until it is over or the store has gone."""
        while self._store is None and not self._over:
            self._find_store()
        try:
            if self._store and self._store.add(f"node {self.nodes.index} comes", 1) > 1:
                self._problem = f"node {self.nodes.index} of {self.nodes.count} is there already: two have that index"
                return
            while self._store and not self._over:
                self._exchange(self._store)
                self._changed.wait(BEAT_SECONDS)
                self._changed.clear()
        except dist.DistError as error:
            self._problem = (
                f"node 0 of {self.nodes.count} was killed or is out of reach: nothing answers at {self.nodes.address}:"
                f"{self.nodes.port} any more ({_first_line(error)})"
            )

    def _find_store(self) -> None:
        place = self.nodes.address, self.nodes.port
        try:
            socket.create_connection(place, WORD_SECONDS).close()  # torch would warn of each that fails
            self._store = dist.TCPStore(*place, timeout=timedelta(seconds=MEET_SECONDS))  # type: ignore[attr-defined]
        except (OSError, dist.DistError) as error:
            self._refused = _first_line(error)
            time.sleep(BEAT_SECONDS)

    def _exchange(self, store: dist.TCPStore) -> None:  # type: ignore[name-defined]
        self._beat += 1
        word = self._word
        store.set(_key(self.nodes.index), json.dumps([word, self._beat]))
        for index in {*range(self.nodes.count)} - {self.nodes.index}:
            if store.check([_key(index)]):
                theirs, beat = json.loads(store.get(_key(index)))
                if index not in self._heard or self._heard[index].beat != beat:
                    self._heard[index] = _Heard(_Word(*theirs), beat, time.monotonic())
        self._said = word


def _key(index: int) -> str:
    return f"node {index}"


def _new_store(nodes: Nodes) -> dist.TCPStore:  # type: ignore[name-defined]
    """On this machine, for all that can connect to it; on any free port, for certain, if none is given."""
    try:
        return dist.TCPStore(LOCAL, nodes.port, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    except dist.DistError as error:
        raise _NodeError(
            f"node 0 of {nodes.count} cannot listen at port {nodes.port} ({_first_line(error)}): another program may "
            "have it; choose another one for all nodes"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
