"""Where MLflow is: a server or a sqlite file, and who one is there."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

DEFAULT_URI = "sqlite:///mlflow.db"


def tracking_uri(uri: str | None = None) -> str:
    """``uri``, else MLFLOW_TRACKING_URI, else ``mlflow.db`` in the current folder; sqlite files as absolute paths."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    database = sqlite_file(uri)
    return f"sqlite:///{database.absolute()}" if database else uri


def public_uri(uri: str) -> str:
    """``uri`` without user name and password, fit for a log or a file."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def login_of(uri: str) -> tuple[str, str] | None:
    """User name and password in the address of a server."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.username:
        return None
    return unquote(parts.username), unquote(parts.password or "")


def sqlite_file(uri: str) -> Path | None:
    """The database file; None where ``uri`` is that of something else."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
