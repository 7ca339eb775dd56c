"""Journal events -> MLflow: the only file that imports mlflow.

Sending is idempotent: runs are found again by their tags, a metric point with the same time stamp is the same point,
parameters are compared before they are written, and a model version is looked up by run and checkpoint. An event may
therefore be sent twice after a crash without leaving two traces.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import getpass
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matvlm.gate import Verdict
from matvlm.tracking.address import login_of, public_uri, sqlite_file
from matvlm.tracking.journal import Event, file_name
from matvlm.tracking.promotion import promote

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)

RUN_KEY_TAG, STEP_TAG = "matvlm.run_key", "matvlm.step"
CHECKPOINT_TAG, LABEL_TAG = "matvlm.checkpoint_uri", "matvlm.label"
# MLflow's limits, the same in every store.
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000
PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000


class TrackingError(RuntimeError):
    """Tracking cannot do what was asked directly of it; a running stage never sees this."""


class UnusableEvent(Exception):
    """MLflow understood the event and will never accept it."""


def key(name: str) -> str:
    """``name`` as MLflow takes it for a metric, parameter or tag: other characters become ``_``."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:KEY_LENGTH]


@contextlib.contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Within it an HTTP request to MLflow gives up after ``seconds`` (by default it retries for minutes)."""
    wanted = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Store:
    """One MLflow store, server or sqlite file. Every method may raise whatever mlflow and the network raise."""

    def __init__(self, uri: str, folder: Path):
        """``folder`` is a local folder for the lock that keeps two steps from creating the same run."""
        self.uri = uri
        self.versions: dict[tuple[str, str], str] = {}
        self.aliases: dict[tuple[str, str], list[str]] = {}
        """Registered, and judged, so far by this object: (model name, checkpoint URI) -> version, and aliases."""
        self._folder = folder
        self._run_ids: dict[tuple[str, str | None], str] = {}
        self._senders: dict[str, Callable[[str, Sequence[Event]], None]] = {
            "open": self._send_open,
            "params": self._send_params,
            "tags": self._send_tags,
            "metrics": self._send_metrics,
            "artifact": self._send_artifact,
            "status": self._send_status,
            "register": self._send_register,
            "verdict": self._send_verdict,
        }

    @functools.cached_property
    def client(self) -> MlflowClient:
        return open_client(self.uri)

    def send(self, header: Event, events: Sequence[Event]) -> None:
        """Send ``events``, all of one kind, to the run that ``header`` (a journal's ``open`` event) names.

        Raises:
            UnusableEvent: MLflow refuses one of them for good.
        """
        run_id = self._run_id(header)
        try:
            self._senders[events[0]["kind"]](run_id, events)
        except UnusableEvent:
            raise
        except Exception as error:
            self._run_ids.clear()  # the run may have been deleted meanwhile: look it up again next time
            if _is_refusal(error) and self.client.get_run(run_id).info.lifecycle_stage == "active":
                raise UnusableEvent(str(error)) from error
            raise

    def _run_id(self, header: Event) -> str:
        """The MLflow run of ``header``, found by its tags or created, its parent too."""
        run_key, step = header["run_key"], header["step"]
        if (run_key, step) not in self._run_ids:
            with _exclusive(self._folder / ".lock"):
                experiment_id = self._experiment_id(header["experiment"])
                parent_id = self._find_or_create(experiment_id, header, None, None)
                self._run_ids[run_key, None] = parent_id
                if step is not None:
                    self._run_ids[run_key, step] = self._find_or_create(experiment_id, header, step, parent_id)
        return self._run_ids[run_key, step]

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            database = sqlite_file(self.uri)
            location = str(database.parent / "mlruns" / file_name(name)) if database else None
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if _code(error) != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self.client.get_experiment_by_name(name)
                assert experiment is not None
        if experiment.lifecycle_stage != "active":
            raise TrackingError(f"the MLflow experiment {name!r} was deleted: restore it or choose another name")
        return str(experiment.experiment_id)

    def _find_or_create(self, experiment_id: str, header: Event, step: str | None, parent_id: str | None) -> str:
        run_key = header["run_key"]
        label = step or ""
        query = f"tags.`{RUN_KEY_TAG}` = '{run_key}' AND tags.`{STEP_TAG}` = '{label}'"
        found = self.client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"])
        if found:
            return str(found[0].info.run_id)
        tags = {RUN_KEY_TAG: run_key, STEP_TAG: label}
        if parent_id is not None:
            tags["mlflow.parentRunId"] = parent_id
        with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
            tags["mlflow.user"] = getpass.getuser()
        run = self.client.create_run(experiment_id, header["time"], tags, run_name=step or run_key)
        return str(run.info.run_id)

    def _send_open(self, run_id: str, events: Sequence[Event]) -> None:
        """The run is RUNNING, and so is its parent, unless that ended later than this."""
        opened = events[-1]
        self.client.update_run(run_id, status="RUNNING")
        if opened["step"] is not None:
            parent = self.client.get_run(self._run_ids[opened["run_key"], None]).info
            if parent.status != "RUNNING" and opened["time"] > (parent.end_time or 0):
                self.client.update_run(parent.run_id, status="RUNNING")

    def _send_status(self, run_id: str, events: Sequence[Event]) -> None:
        self.client.set_terminated(run_id, events[-1]["status"], events[-1]["time"])

    def _send_metrics(self, run_id: str, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric

        self.client.log_batch(
            run_id,
            metrics=[
                Metric(name, value, event["time"], event["step"])
                for event in events
                for name, value in event["values"].items()
            ],
        )

    def _send_params(self, run_id: str, events: Sequence[Event]) -> None:
        """Parameters are write-once in MLflow: a changed one is kept as a tag beside its first value."""
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        values = _merged(events)
        new = [Param(name, value) for name, value in values.items() if name not in known]
        for start in range(0, len(new), PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=new[start : start + PARAMS_PER_CALL])
        self._tag(run_id, {key(f"matvlm.changed.{k}"): v for k, v in values.items() if known.get(k, v) != v})

    def _send_tags(self, run_id: str, events: Sequence[Event]) -> None:
        self._tag(run_id, _merged(events))

    def _tag(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(name, value[:TAG_LENGTH]) for name, value in values.items()]
        for start in range(0, len(tags), PARAMS_PER_CALL):
            self.client.log_batch(run_id, tags=tags[start : start + PARAMS_PER_CALL])

    def _send_artifact(self, run_id: str, events: Sequence[Event]) -> None:
        for event in events:
            path = self._folder / event["file"]
            if not path.is_file():
                raise UnusableEvent(f"{path} is gone")
            self.client.log_artifact(run_id, str(path), event["folder"] or None)

    def _send_register(self, run_id: str, events: Sequence[Event]) -> None:
        for event in events:
            name, uri = event["name"], event["checkpoint_uri"]
            version = self._find_version(name, run_id, uri) or self._create_version(run_id, event)
            self.versions[name, uri] = version

    def _send_verdict(self, run_id: str, events: Sequence[Event]) -> None:
        for event in events:
            name, uri = event["name"], event["checkpoint_uri"]
            version = event["version"] or self._find_version(name, run_id, uri)
            if version is None:
                raise UnusableEvent(f"{uri} is no version of the model {name!r}")
            verdict = Verdict.model_validate(event["verdict"])
            self.aliases[name, uri] = promote(self.client, name, version, verdict, event["time"])

    def _find_version(self, name: str, run_id: str, uri: str) -> str | None:
        for version in self.client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'"):
            if version.tags.get(CHECKPOINT_TAG) == uri:
                return str(version.version)
        return None

    def _create_version(self, run_id: str, event: Event) -> str:
        from mlflow.exceptions import MlflowException

        name, uri = event["name"], event["checkpoint_uri"]
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
        create = functools.partial(
            self.client.create_model_version, name, run_id=run_id, tags=event["tags"], await_creation_for=0
        )
        try:
            version = create(source=uri)
        except MlflowException as error:
            if _code(error) != "INVALID_PARAMETER_VALUE":
                raise
            # A server takes no local folder outside its own artifacts; CHECKPOINT_TAG still names the checkpoint.
            version = create(source=self.client.get_run(run_id).info.artifact_uri)
        return str(version.version)


def open_client(uri: str) -> MlflowClient:
    """An MLflow client for ``uri``, quiet and without usage reports to MLflow's makers.

    MLflow prints the address of a server, and puts it into errors: user and password of ``uri`` go another way.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if login := login_of(uri):
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = login
        uri = public_uri(uri)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = sqlite_file(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(uri, uri)


def _code(error: Exception) -> str:
    return str(getattr(error, "error_code", ""))


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow, or a proxy before it, says that this very content is wrong (and not that it has a problem)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return _code(error) == "INVALID_PARAMETER_VALUE" or status in (400, 413, 422)


def _merged(events: Sequence[Event]) -> dict[str, Any]:
    return {name: value for event in events for name, value in event["values"].items()}


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
