"""One pod as a process: what its container sees, how it ends, what its status says."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sysconfig
import threading
import venv
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import psutil

from kube.schema import Object

ADDRESS = "127.0.0.1"
"""Of every pod and of the node."""
MESSAGE_CHARS = 2048
"""Of a failed pod's log that its status repeats."""


def make_image(folder: Path) -> dict[str, str]:
    """An environment like that of the tests without the project itself, whose code has to travel with a run.

    Returns:
        The variables of a container that is started from it.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Python searches folders that a .pth file names, and does not read .pth files there, as an editable install's is.
    (site / "packages.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return {
        "PATH": f"{folder / 'bin'}:{os.defpath}",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "METAFLOW_SKIP_INSTALL_DEPENDENCIES": "1",
        "KUBERNETES_SERVICE_HOST": ADDRESS,
        "KUBERNETES_SERVICE_PORT": "443",
    }


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' own ``$(NAME)``; an unknown name stays as it is, and ``$$`` is a dollar sign."""

    def replaced(found: re.Match[str]) -> str:
        return "$" if found[1] == "$" else variables.get(found[2], found[0])

    return re.sub(r"\$(\$|\(([^)]*)\))", replaced, text)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def container_of(pod: Object) -> Object:
    container: Object = pod["spec"]["containers"][0]
    return container


def field(pod: Object, path: str) -> str:
    """What a ``fieldRef`` reads; a label or annotation that is not there is empty."""
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path):
        return str(pod["metadata"].get(found[1], {}).get(found[2], ""))
    section, name = path.split(".")
    return str(pod[section][name])


def variables_of(pod: Object, image: Mapping[str, str], secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The environment of the pod's container, and nothing of this process's own.

    Raises:
        KeyError: a secret does not exist.
    """
    container, found = container_of(pod), dict(image)
    for source in container.get("envFrom", []):
        reference = source["secretRef"]
        if reference["name"] in secrets or not reference.get("optional", False):
            found |= secrets[reference["name"]]
    for variable in container.get("env", []):
        if "valueFrom" in variable:
            found[variable["name"]] = field(pod, variable["valueFrom"]["fieldRef"]["fieldPath"])
        else:
            found[variable["name"]] = expand(variable.get("value", ""), found)
    return found


def set_state(pod: Object, phase: str, **state: Object) -> None:
    """Write the pod's phase and its container's only state: waiting, running or terminated."""
    container = container_of(pod)
    pod["status"] |= {
        "phase": phase,
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container["image"],
                "imageID": "",
                "ready": phase == "Running",
                "restartCount": 0,
                "state": state,
            }
        ],
    }


class Container:
    """The process of one pod. ``ended`` is called once with its exit code, from a thread of the container's own."""

    def __init__(self, pod: Object, folder: Path, variables: dict[str, str], ended: Callable[[int, str], None]):
        self.log = folder / "log.txt"
        home = folder / "home"
        home.mkdir(parents=True)
        self._home = str(home)
        container = container_of(pod)
        words = [expand(word, variables) for word in (*container["command"], *container.get("args", []))]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                words,
                cwd=home,
                env={**variables, "HOME": self._home},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is not meant for pods
            )
        self._ended = ended
        self._seconds: float | None = pod["spec"].get("activeDeadlineSeconds")
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def watch(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        reason = ""
        try:
            code = self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code, reason = self._process.wait(), "DeadlineExceeded"
        self.kill()  # whoever it left behind ends with its container
        self._ended(code if code >= 0 else 128 - code, reason)

    def kill(self) -> None:
        """SIGKILL until none of its processes is left; the grace that a pod may ask for is not waited for."""
        while members := self._members():
            for process in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _members(self) -> list[psutil.Process]:
        """All that came of its first process, which a new session or the death of a parent does not hide."""
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get("HOME") == self._home]

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")
