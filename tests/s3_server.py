"""A real S3 server on loopback for tests, and the variables that lead boto3 to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from matvlm.storage import s3

BUCKET = "matvlm-test"


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
