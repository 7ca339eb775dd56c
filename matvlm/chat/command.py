"""The commands ``chat`` and ``demo``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Protocol

from matvlm.storage import StorageError
from matvlm.tracking import resolve_checkpoint

if TYPE_CHECKING:
    from matvlm.chat.speaker import Speaker
    from matvlm.generation import Sampling

ANSWER_TOKENS = 256
HOST, PORT = "127.0.0.1", 8000


class Add(Protocol):
    def __call__(self, name: str, run: object, summary: str, epilog: str = "") -> argparse.ArgumentParser: ...


def register(add: Add, checkpoints: str) -> None:
    """Add both commands to the command line; ``checkpoints`` says what a CHECKPOINT is."""
    command = add("chat", _chat, "talk with a model about an image, in the terminal", checkpoints)
    command.add_argument("model", metavar="CHECKPOINT")
    command.add_argument("--image", required=True, metavar="FILE", help="local or on s3://")
    what = "ask this and end; the answer alone goes to standard output"
    command.add_argument("--prompt", metavar="TEXT", help=what)
    _add_sampling(command)

    command = add("demo", _demo, "a web page on which teacher and student answer side by side", checkpoints)
    command.add_argument("model", metavar="CHECKPOINT")
    what = "the CHECKPOINT of the teacher; default: the one that the student's config.json says it comes from"
    command.add_argument("--against", metavar="CHECKPOINT", help=what)
    what = "default: %(default)s; with 0.0.0.0 everyone in the network can use the page, it knows no passwords"
    command.add_argument("--host", default=HOST, help=what)
    command.add_argument("--port", type=int, default=PORT, help="default: %(default)s; 0 is any free one")
    _add_sampling(command)


def _add_sampling(command: argparse.ArgumentParser) -> None:
    what = "end an answer after N tokens; default: %(default)s"
    command.add_argument("--max-new-tokens", type=int, default=ANSWER_TOKENS, metavar="N", help=what)
    what = "draw tokens at this temperature; default: 0, always the likeliest one"
    command.add_argument("--temperature", type=float, default=0.0, metavar="T", help=what)
    command.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    what = "draw from the likeliest tokens that have P of the probability together"
    command.add_argument("--top-p", type=float, metavar="P", help=what)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws; default: %(default)s")


def _sampling(options: argparse.Namespace) -> Sampling:
    from matvlm.generation import Sampling

    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )


def _chat(options: argparse.Namespace) -> None:
    from matvlm.chat.speaker import open_image
    from matvlm.chat.terminal import Conversation, converse

    sampling, image = _sampling(options), open_image(options.image)
    conversation = Conversation(_open(options.model), image, sampling)
    if options.prompt is None:
        converse(conversation)
    else:
        conversation.ask(options.prompt)


def _demo(options: argparse.Namespace) -> None:
    from matvlm.chat.demo import Role, bind, make_app, serve

    sampling = _sampling(options)
    with bind(options.host, options.port) as listening:
        student = _open(options.model)
        teacher, notice = _teacher(options, student.uri)
        roles = [Role("teacher", teacher), Role("student", student)] if teacher else [Role("model", student)]
        for role in roles:
            role.speaker.warm_up(sampling)
        if notice:
            print(notice, file=sys.stderr)
        host, port = listening.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"http://{address} is ready; Ctrl-C ends it", flush=True)
        serve(make_app(roles, sampling, notice), listening)


def _teacher(options: argparse.Namespace, student: str) -> tuple[Speaker | None, str]:
    """The teacher, or None and why there is none."""
    from matvlm.chat.speaker import teacher_of

    if options.against:
        return _open(options.against), ""
    uri = teacher_of(student)
    if uri is None:
        return None, f"{options.model}: its config.json names no teacher; name one with --against"
    try:
        return _open(uri), ""
    except (ValueError, StorageError) as error:
        return None, f"its teacher cannot be opened, name one with --against: {error}"


def _open(spec: str) -> Speaker:
    import torch

    from matvlm.chat.speaker import Speaker

    return Speaker(resolve_checkpoint(spec), "cuda" if torch.cuda.is_available() else "cpu")
