"""Evaluates every new checkpoint once: looks at a registry or folder, and runs a command for each that is new there.

A watcher works in a place, a folder of its own. It holds the place's lock and lends it to the command it runs, so a
watcher that is started after another one was killed waits for what that one has left running, and then goes by its exit
status, which is kept in the place. Only a command that was killed itself is run again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import matvlm
from matvlm.storage import StorageError, folder_name, write_bytes
from matvlm.tracking import TrackingError
from matvlm.watch.claims import DONE, FAILED, Claims
from matvlm.watch.sources import Folder, RegisteredModel, Source

__all__ = ["Folder", "RegisteredModel", "Source", "Watcher", "evaluation", "place_of"]

log = logging.getLogger(__name__)

LOCK, NAME, EXIT, OUTPUT = "lock", "name", "exit", "output.txt"
CHECKPOINT = "{checkpoint}"
GRACE_SECONDS = 60
RUN = """trap 'exit 130' INT TERM HUP; "$@"; code=$?; echo $code > "$0.new" && mv "$0.new" "$0" """
"""For sh: a command, and then its exit status into a file; not if it was interrupted."""


class Watcher:
    """Runs ``command(checkpoint)`` once for every checkpoint of ``source``, one after the other.

    Args:
        recipe: the name of what they are evaluated by; each is evaluated once for each name.
        place: the watcher's folder.
        say: gets a line about whatever happens.
    """

    def __init__(
        self,
        source: Source,
        recipe: str,
        command: Callable[[str], Sequence[str]],
        place: Path,
        say: Callable[[str], object],
    ):
        self.source, self.recipe, self.command, self.place, self.say = source, recipe, command, place, say

    def once(self, retry: bool = False) -> list[str]:
        """Look once; returns what was tried now and failed. With ``retry`` what failed before is tried again.

        Raises:
            TrackingError, StorageError: the source cannot be reached, read or marked; what ran is not lost by that.
        """
        with self._locked() as lock:
            claims = Claims(self.source, self.recipe, self._name())
            if retry:
                self._forget(claims)
            return self._look(claims, lock)

    def keep_on(self, every_seconds: float, retry: bool = False) -> None:
        """``once`` again and again, until this process ends; what cannot be reached is tried again the next time."""
        with self._locked() as lock:
            claims = Claims(self.source, self.recipe, self._name())
            while True:
                try:
                    if retry:
                        self._forget(claims)
                    retry = False
                    self._look(claims, lock)
                except (TrackingError, StorageError) as error:
                    log.warning("%s; looking again in %g s", error, every_seconds)
                time.sleep(every_seconds)

    def _look(self, claims: Claims, lock: int) -> list[str]:
        failed = []
        for checkpoint in claims.new():
            folder = self.place / folder_name(checkpoint)
            if not (folder / EXIT).exists():
                if not claims.take(checkpoint):
                    self.say(f"{checkpoint}: another watcher has it")
                    continue
                self.say(f"{checkpoint}: evaluating, its output goes to {folder / OUTPUT}")
                self._run(checkpoint, folder, lock)
            outcome = self._outcome(folder)
            self.say(f"{checkpoint}: {outcome}")
            failed += [] if outcome == DONE else [checkpoint]
            if (folder / EXIT).exists():
                claims.finish(checkpoint, outcome)
                (folder / EXIT).unlink()
        return failed

    def _run(self, checkpoint: str, folder: Path, lock: int) -> None:
        """Run the command to its end; it outlives this process, unless that is interrupted by Ctrl-C."""
        folder.mkdir(parents=True, exist_ok=True)
        words = ["sh", "-c", RUN, str(folder / EXIT), *self.command(checkpoint)]
        with (folder / OUTPUT).open("ab") as output:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],
            )
        try:
            process.wait()
        except BaseException:
            _end(process)
            raise
        if not (folder / EXIT).exists():
            _end(process)  # the shell was killed; what it ran may be alive

    def _outcome(self, folder: Path) -> str:
        if not (folder / EXIT).exists():
            return f"the evaluation was killed; the next look runs it again (see {folder / OUTPUT})"
        code = int((folder / EXIT).read_text())
        return DONE if code == 0 else f"{FAILED} with exit status {code}: {_last_line(folder / OUTPUT)}"

    def _forget(self, claims: Claims) -> None:
        for checkpoint in claims.forget_failures():
            (self.place / folder_name(checkpoint) / EXIT).unlink(missing_ok=True)

    def _name(self) -> str:
        """The place's own name, made up the first time."""
        path = self.place / NAME
        if not path.exists():
            write_bytes(path, secrets.token_hex(4).encode())
        return path.read_text()

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the place's lock, once whoever holds it now has ended."""
        self.place.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.place / LOCK, os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"waiting for another watcher, or an evaluation that one has left, in {self.place}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock
        finally:
            os.close(lock)


def evaluation(command: str | None, recipe: str, changes: Sequence[str]) -> Callable[[str], list[str]]:
    """What to run for a checkpoint: ``command``, in which ``{checkpoint}`` stands for it, or the project's flow.

    Args:
        recipe: the file that the flow gets.
        changes: overrides of the recipe's fields, for the flow.

    Raises:
        ValueError: ``command`` does not say ``{checkpoint}`` or has an open quote, or the flow is not there.
    """
    if command is not None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"--run {command!r}: {error}") from None
        if not any(CHECKPOINT in word for word in words):
            raise ValueError(f"--run {command!r}: say where the checkpoint goes, by {CHECKPOINT}")
        return lambda checkpoint: [word.replace(CHECKPOINT, checkpoint) for word in words]
    flow = Path(matvlm.__file__).parents[1] / "flows" / "eval_flow.py"
    if not flow.is_file():
        raise ValueError(
            f"{flow}: not there, as matvlm is installed without its flows: say what to do by --run COMMAND"
        )
    words = [sys.executable, str(flow), "--config", "recipe", recipe, "run"]
    overrides = ["--set", *changes] if changes else []
    return lambda checkpoint: [*words, "--checkpoint", checkpoint, *overrides]


def place_of(source: Source, recipe: str, runs: Path) -> Path:
    """The usual place, below the folder of runs, of a watcher of ``source`` by ``recipe``."""
    return runs / "watch" / f"{recipe}-{hashlib.sha256(source.name.encode()).hexdigest()[:8]}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"
