"""The HTTP side: what a client asks of the API, and the settings that lead it here."""

from __future__ import annotations

import json
import re
import secrets as random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from kube.cluster import KINDS, Cluster, ExistsError, MissingError
from kube.listen import listen
from kube.schema import InvalidError, Object

PATH = re.compile(
    r"/(?:api|apis)/(?P<version>v1|[^/]+/[^/]+)/namespaces/(?P<namespace>[^/]+)"
    r"/(?P<plural>\w+)(?:/(?P<name>[^/]+)(?:/(?P<part>\w+))?)?"
)
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "AlreadyExists",
    415: "UnsupportedMediaType",
    422: "Invalid",
}
VERBS = {"pods": ["delete", "get", "list"]}
ALL_VERBS = ["create", "delete", "get", "list", "patch"]


class RequestError(Exception):
    """A request that is refused with an HTTP status."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Api:
    """A cluster that listens.

    Attributes:
        cluster: what is in it.
        requests: method and path of every request.
        refused: why objects were not taken.
        kubeconfig: the file to name in ``KUBECONFIG``.
    """

    def __init__(self, cluster: Cluster, kubeconfig: Path):
        self.cluster = cluster
        self.requests: list[tuple[str, str]] = []
        self.refused: list[str] = []
        self.kubeconfig = kubeconfig
        self.token = random.token_hex(16)

    def answer(self, method: str, target: str, content_type: str, body: bytes) -> Object | str:
        """An object, or the text of a log.

        Raises:
            RequestError, InvalidError, MissingError, ExistsError: it is refused.
        """
        url = urlsplit(target)
        path, query = unquote(url.path), {key: values[-1] for key, values in parse_qs(url.query).items()}
        if method == "GET" and (known := _discovery(path)):
            return known
        found = PATH.fullmatch(path)
        if not found or KINDS.get(found["plural"], ("",))[0] != found["version"]:
            raise RequestError(404, f"the server could not find the requested resource: {path}")
        place = (found["plural"], found["namespace"])
        if found["part"]:
            if (found["plural"], found["part"], method) != ("pods", "log", "GET"):
                raise RequestError(403, f"{found['part']} is not allowed here")
            return self.cluster.log(found["namespace"], found["name"])
        if found["name"]:
            return self._one(method, (*place, found["name"]), content_type, body)
        if method == "GET":
            return self._listing(*place, query)
        if method == "POST" and found["plural"] != "pods":
            return self.cluster.create(*place, _json(body))
        raise RequestError(405, f"{method} is not allowed on {path}")

    def _one(self, method: str, place: tuple[str, str, str], content_type: str, body: bytes) -> Object:
        if method == "GET":
            return self.cluster.get(*place)
        if method == "DELETE":
            return self.cluster.delete(*place)
        if method == "PATCH" and place[0] != "pods":
            if "merge-patch" not in content_type:
                raise RequestError(415, f"{content_type}: only merge patches are understood")
            return self.cluster.patch(*place, _json(body))
        raise RequestError(405, f"{method} is not allowed on {place[0]}")

    def _listing(self, plural: str, namespace: str, query: Mapping[str, str]) -> Object:
        version, kind = KINDS[plural]
        items = [
            made
            for made in self.cluster.list(plural, namespace)
            if _chosen(query.get("labelSelector", ""), made["metadata"].get("labels", {}).get)
            and _chosen(query.get("fieldSelector", ""), lambda path, made=made: _at(made, path))
        ]
        return {"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items}


def _json(body: bytes) -> Object:
    try:
        read = json.loads(body)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise RequestError(400, "the body is not an object")
    return read


def _at(made: Object, path: str) -> str | None:
    value: Any = made
    for key in path.split("."):
        value = value.get(key, {})
    return value or None


def _chosen(selector: str, value_of: Callable[[str], str | None]) -> bool:
    """Whether an object fits ``a=b,c!=d,e``."""
    for term in filter(None, selector.split(",")):
        found = re.fullmatch(r"([^=!]+)(?:(==|=|!=)(.*))?", term)
        if not found:
            raise RequestError(400, f"{term}: not a selector that is understood")
        key, sign, wanted = found.groups()
        value = value_of(key)
        if value is None if sign is None else (value == wanted) == (sign == "!="):
            return False
    return True


def _discovery(path: str) -> Object | None:
    """What a client is told of the server, its groups and their kinds."""
    groups = sorted({version for version, _ in KINDS.values() if "/" in version})
    if path == "/version":
        return {"major": "1", "minor": "37", "gitVersion": "v1.37.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        named = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
        rows = [
            {"name": one["groupVersion"].split("/")[0], "versions": [one], "preferredVersion": one} for one in named
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": rows}
    version = path.removeprefix("/apis/").removeprefix("/api/")
    kinds = [
        {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": VERBS.get(plural, ALL_VERBS)}
        for plural, (owner, kind) in KINDS.items()
        if owner == version
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": kinds} if kinds else None


def _handler(api: Api) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet
        disable_nagle_algorithm = True

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            api.requests.append((self.command, self.path))
            try:
                if self.headers.get("Authorization") != f"Bearer {api.token}":
                    raise RequestError(401, "Unauthorized")
                answer = api.answer(self.command, self.path, self.headers.get("Content-Type", ""), body)
                self._send(201 if self.command == "POST" else 200, answer)
            except InvalidError as error:
                api.refused.append(str(error))
                self._fail(422, str(error))
            except MissingError as error:
                self._fail(404, error.args[0])
            except ExistsError as error:
                self._fail(409, str(error))
            except RequestError as error:
                self._fail(error.code, str(error))

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _do

        def _fail(self, code: int, message: str) -> None:
            status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
            self._send(code, {**status, "message": message, "reason": REASONS[code], "code": code})

        def _send(self, code: int, answer: Object | str) -> None:
            text = isinstance(answer, str)
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return Handler


@contextmanager
def serve(folder: Path, secrets: Mapping[str, Mapping[str, str]]) -> Iterator[Api]:
    """A cluster with these secrets that listens on loopback and keeps its files in ``folder``."""
    api = Api(Cluster(folder, secrets), folder / "kubeconfig")
    try:
        with listen(_handler(api)) as url:
            api.kubeconfig.write_text(yaml.safe_dump(_settings(url, api.token)))
            yield api
    finally:
        api.cluster.close()


def _settings(url: str, token: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "loopback",
        "clusters": [{"name": "loopback", "cluster": {"server": url}}],
        "users": [{"name": "tester", "user": {"token": token}}],
        "contexts": [{"name": "loopback", "context": {"cluster": "loopback", "user": "tester"}}],
    }
