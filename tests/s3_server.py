"""A real S3 server on loopback for tests, the variables that lead boto3 to it, and a proxy that makes it unreliable."""

from __future__ import annotations

import http.client
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from matvlm.storage import s3

BUCKET = "matvlm-test"
FAULTS = ("InternalError", "SlowDown", "reset", "lost")
"""What ``Unreliable`` injects: errors by S3's names, a reset of the connection, one after the server has obeyed."""


@contextmanager
def serve() -> Iterator[str]:
    """The URL of a moto server that runs while the block lasts."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def variables(endpoint: str, cache: Path) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "MATVLM_CACHE": str(cache),
    }


@contextmanager
def empty_bucket(endpoint: str, cache: Path) -> Iterator[str]:
    """The URI of a bucket that is emptied again; this process talks to the server meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(endpoint, cache).items():
            patch.setenv(name, value)
        s3._client_of.cache_clear()
        client = s3._client()
        client.create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for item in page.get("Contents", []):
                client.delete_object(Bucket=BUCKET, Key=item["Key"])
        s3._client_of.cache_clear()


class Unreliable(ThreadingHTTPServer):
    """A proxy on loopback before ``endpoint`` that answers ``share`` of the requests by one of ``FAULTS`` instead.

    Which ones depends on ``seed``, on the request and on how often it came before, and not on the order of others.
    ``injected`` counts the faults by name, ``passed`` the other requests.
    """

    daemon_threads = True

    def __init__(self, endpoint: str, share: float, seed: int):
        super().__init__(("127.0.0.1", 0), _Passing)
        self.asked, self.share, self.seed = urlsplit(endpoint).netloc, share, seed
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.injected, self.passed = Counter[str](), 0
        self._seen = Counter[tuple[str, str]]()
        self._counting = threading.Lock()

    def fault(self, method: str, path: str) -> str | None:
        """What to do to this request, counted; None for nothing."""
        with self._counting:
            self._seen[method, path] += 1
            chance = random.Random(f"{self.seed} {method} {path} {self._seen[method, path]}")
            if chance.random() >= self.share:
                self.passed += 1
                return None
            kinds = [name for name in FAULTS if name != "lost" or method != "POST"]  # a POST may not be repeatable
            kind = chance.choice(kinds)
            self.injected[kind] += 1
            return kind


class _Passing(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Unreliable

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind = self.server.fault(self.command, self.path)
        if kind in ("InternalError", "SlowDown"):
            status, headers = 500 if kind == "InternalError" else 503, [("Content-Type", "application/xml")]
            content = f"<Error><Code>{kind}</Code><Message>injected</Message></Error>".encode()
        elif kind != "reset":
            status, headers, content = self._ask(body)
        if kind in ("reset", "lost"):
            self._reset()
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.asked, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OF_A_CONNECTION]
        return answer.status, kept, content

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # of a connection that was reset, here or by whoever asked
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


_OF_A_CONNECTION = ("connection", "transfer-encoding", "keep-alive")


@contextmanager
def unreliable(endpoint: str, share: float = 0.2, seed: int = 0) -> Iterator[Unreliable]:
    """An ``Unreliable`` proxy that runs while the block lasts."""
    with Unreliable(endpoint, share, seed) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
