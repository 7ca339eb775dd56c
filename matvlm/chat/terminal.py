"""A conversation in the terminal: what is said goes to stdout as it comes, figures and complaints go to stderr."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from threading import Event
from types import FrameType

import torch
from PIL import Image

from matvlm.chat.speaker import Speaker, figures, open_image
from matvlm.data.encoding import Turn
from matvlm.generation import Sampling
from matvlm.storage import StorageError

COMMANDS = "/image FILE: ask about another image; /reset: forget the conversation; Ctrl-C: stop an answer; Ctrl-D: end"


class Conversation:
    """Questions about ``image`` and what ``speaker`` answered. Answer n, counted from 0, is drawn with ``seed`` + n."""

    def __init__(self, speaker: Speaker, image: Image.Image, sampling: Sampling):
        self.speaker, self.image, self.sampling = speaker, image, sampling
        self.turns: list[Turn] = []

    def ask(self, question: str) -> None:
        """Print the answer and its figures. Ctrl-C ends the answer after its next token; what was said counts.

        Raises:
            ValueError: the question cannot be asked.
        """
        stream = self.speaker.ask(self.image, question, self.sampling, self.turns)
        said = ""
        with _stoppable() as stop:
            for piece in stream:
                print(piece if said else piece.lstrip(), end="", flush=True)
                said += piece
                if stop.is_set():
                    break
        print(flush=True)
        print(f"[{figures(stream)}{', stopped' if stop.is_set() else ''}]", file=sys.stderr)
        self.turns.append(Turn(question, said.strip()))
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)

    def obey(self, line: str) -> None:
        """Do what the user typed: a command, a question, or nothing.

        Raises:
            ValueError: no such command, no image, or a question that cannot be asked.
            StorageError: no such file.
        """
        word, _, argument = line.strip().partition(" ")
        if word == "/image":
            self.image, self.turns = open_image(argument.strip()), []
        elif word == "/reset":
            self.turns = []
        elif word.startswith("/"):
            raise ValueError(f"{word}: no such command; {COMMANDS}")
        elif word:
            self.ask(line.strip())


def converse(conversation: Conversation) -> None:
    """Obey one line after the other until Ctrl-D; what goes wrong with a line is one message."""
    with suppress(ImportError):  # not on every system; it lets ``input`` edit and remember lines
        import readline  # noqa: F401
    print(f"{conversation.speaker.facts}\n{COMMANDS}", file=sys.stderr, flush=True)
    for line in _lines():
        try:
            conversation.obey(line)
        except (ValueError, StorageError, torch.OutOfMemoryError) as error:
            print(error, file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(flush=True)
        except EOFError:
            print(flush=True)
            return


@contextmanager
def _stoppable() -> Iterator[Event]:
    """Inside, the first Ctrl-C sets the event, so that a model is left between two tokens; the second is as ever."""
    stop = Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
