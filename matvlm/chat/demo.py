"""A web page that asks one or two models the same question about an image, and shows what each answer took.

The models answer one after the other, also for several visitors, because two at once on one device would each show
half of their speed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from threading import Event
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from PIL import Image

from matvlm.chat.speaker import Speaker, as_image, figures
from matvlm.generation import Sampling

logger = logging.getLogger(__name__)

LARGEST_IMAGE = 32 << 20
"""In bytes; a larger upload is refused."""
LAST_WORDS_SECONDS = 1
"""How long an unfinished answer may hold up the end of the server."""


class Role(NamedTuple):
    """A model on the page, and the name that it has there."""

    name: str
    speaker: Speaker


class Panel:
    """The models of a page; they are used in one thread of their own, by one question after the other."""

    def __init__(self, roles: Sequence[Role], sampling: Sampling):
        self.roles, self.sampling = roles, sampling
        self.worker = ThreadPoolExecutor(1, "models")

    async def events(self, image: Image.Image, question: str) -> AsyncIterator[str]:
        """What happens, a line of JSON each: ``model`` (its number) and ``piece``, ``figures`` or ``error``.

        If nobody listens any more, the answer ends with its next token.
        """
        loop, queue, gone = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None](), Event()

        def work() -> None:
            for event in self._answers(image, question, gone):
                loop.call_soon_threadsafe(queue.put_nowait, event)
            loop.call_soon_threadsafe(queue.put_nowait, None)

        self.worker.submit(work)
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            gone.set()

    def _answers(self, image: Image.Image, question: str, gone: Event) -> Iterator[dict[str, Any]]:
        for number, (name, speaker) in enumerate(self.roles):
            if gone.is_set():
                return
            try:
                stream = speaker.ask(image, question, self.sampling)
                for piece in stream:
                    yield {"model": number, "piece": piece}
                    if gone.is_set():
                        return
                yield {"model": number, "figures": figures(stream)}
            except ValueError as error:
                yield {"model": number, "error": str(error)}
            except Exception as error:  # the page outlives whatever one question does to a model
                logger.exception("the %s could not answer", name)
                yield {"model": number, "error": f"{type(error).__name__}: {error}"}


def make_app(roles: Sequence[Role], sampling: Sampling, notice: str = "") -> FastAPI:
    """The page for ``roles``; ``notice`` stands on it."""
    app = FastAPI(openapi_url=None)  # with it would come pages that load scripts from elsewhere
    panel = Panel(roles, sampling)
    html = files("matvlm").joinpath("chat", "page.html").read_text(encoding="utf-8")

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(html)

    @app.get("/about")
    def about() -> dict[str, Any]:
        models = [{"name": name, "uri": speaker.uri, "facts": speaker.facts} for name, speaker in roles]
        return {"models": models, "notice": notice, "max_new_tokens": sampling.max_new_tokens}

    @app.post("/answers")
    async def answers(request: Request, question: str, name: str = "the upload") -> Response:
        """The body is the image file called ``name``."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > LARGEST_IMAGE:
                return JSONResponse({"error": f"{name}: larger than {LARGEST_IMAGE >> 20} MiB"}, 413)
        try:
            image = await asyncio.to_thread(as_image, bytes(content), name)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        return StreamingResponse(panel.events(image, question), media_type="application/x-ndjson")

    return app


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at ``host`` and ``port``; port 0 is any free one.

    Raises:
        ValueError: there is no such address here, or something listens there already.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there: {error}; choose another one") from None


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answer at ``listening`` until Ctrl-C."""
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=LAST_WORDS_SECONDS)
    with suppress(KeyboardInterrupt):  # the server has ended by then
        uvicorn.Server(config).run(sockets=[listening])
