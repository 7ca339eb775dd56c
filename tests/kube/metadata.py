"""Metaflow's metadata service, as much of it as its client asks for; what it is told lasts as long as it runs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kube.listen import listen
from kube.schema import Object

VERSION = "2.5.0"
LEVELS = ("flows", "runs", "steps", "tasks")
ID_OF = ("flow_id", "run_number", "step_name", "task_id")
HEARTBEAT = json.dumps({"wait_time_in_seconds": 10})
Place = tuple[str, ...]
"""Flow, run, step and task, or the first of these."""


class Metadata:
    """Flows, runs, steps and tasks as a tree, and what tasks have said and made."""

    def __init__(self) -> None:
        self._objects: dict[Place, Object] = {}
        self._said: dict[Place, list[Object]] = {}
        self._artifacts: dict[Place, list[Object]] = {}
        self._numbers = count(1)
        self._lock = threading.Lock()

    def get(self, path: str, query: dict[str, str]) -> Any:
        """An object, or those below it.

        Raises:
            LookupError: there is nothing.
        """
        place, rest = split(path)
        with self._lock:
            if rest[:1] == [LEVELS[len(place)] if len(place) < len(LEVELS) else ""]:
                return self._below(place)
            made = self._objects[place]
            if not rest:
                return made
            if rest == ["metadata"]:
                return self._said.get(place, [])
            if rest == ["filtered_tasks"]:
                return ["/".join(task) for task in self._objects if self._fits(task, place, query)]
            return self._made(place, rest)

    def post(self, path: str, sent: Any) -> Any:
        """Keep what is sent."""
        place, rest = split(path)
        with self._lock:
            if rest == ["heartbeat"]:
                return HEARTBEAT
            if rest in (["metadata"], ["artifact"]):
                kept = self._said if rest == ["metadata"] else self._artifacts
                kept.setdefault(place, []).extend(dict(zip(ID_OF, place, strict=True)) | one for one in sent)
                return {}
            if rest in (["run"], ["task"]):
                given = sent.get("run_number" if rest == ["run"] else "task_id")
                place = (*place, str(given or next(self._numbers)))
            made = sent | dict(zip(ID_OF, place, strict=False)) | {"ts_epoch": time.time_ns() // 10**6}
            return self._objects.setdefault(place, made)

    def _below(self, place: Place) -> list[Object]:
        return [made for one, made in self._objects.items() if one[:-1] == place]

    def _fits(self, task: Place, step: Place, query: dict[str, str]) -> bool:
        name, pattern = query.get("metadata_field_name"), query.get("pattern", "")
        return task[:-1] == step and (
            name is None
            or any(one["field_name"] == name and re.search(pattern, one["value"]) for one in self._said.get(task, []))
        )

    def _made(self, task: Place, rest: list[str]) -> Any:
        """Artifacts of an attempt, of the last one by default: all of them, or the one that is named."""
        made = self._artifacts.get(task, [])
        attempt = max((int(one["attempt_id"]) for one in made), default=0)
        if "attempt" in rest:
            where = rest.index("attempt")
            attempt, rest = int(rest[where + 1]), rest[:where] + rest[where + 2 :]
        found = [one for one in made if int(one["attempt_id"]) == attempt]
        if rest == ["artifacts"]:
            return found
        return next(one for one in found if rest == ["artifacts", one["name"]])


def split(path: str) -> tuple[Place, list[str]]:
    """The object that a path names, and what is asked of it: /flows/F/runs/1/steps -> (F, 1), [steps]."""
    words, place = path.strip("/").split("/"), ()
    while len(place) < len(LEVELS) and len(words) > 1 and words[0] == LEVELS[len(place)]:
        place, words = (*place, words[1]), words[2:]
    return place, words


@contextmanager
def serve() -> Iterator[str]:
    """The URL of an empty service."""
    metadata = Metadata()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            try:
                self._send(200, "pong" if url.path == "/ping" else metadata.get(url.path, query))
            except (LookupError, StopIteration):
                self._send(404, {"message": f"{self.path} not found"})

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(200, metadata.post(urlsplit(self.path).path, sent))

        def _send(self, code: int, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("METADATA_SERVICE_VERSION", VERSION)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with listen(Handler) as url:
        yield url
