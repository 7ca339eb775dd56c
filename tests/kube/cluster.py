"""The objects of a cluster, and what its controllers do: JobSets make Jobs, Jobs make pods, pods run and end."""

from __future__ import annotations

import copy
import re
import secrets as random
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from kube import pods
from kube.schema import InvalidError, Object, check, merged, without_nulls

KINDS = {"jobs": ("batch/v1", "Job"), "jobsets": ("jobset.x-k8s.io/v1alpha2", "JobSet"), "pods": ("v1", "Pod")}
"""Plural -> version and kind of all that there is."""
JOBSET = "jobset.sigs.k8s.io"
ALIVE = ("Pending", "Running")


class MissingError(LookupError):
    """There is no such object."""


class ExistsError(ValueError):
    """There is one of that name already."""


class Cluster:
    """Thread-safe; its nodes have room for every pod, whatever it asks for.

    Attributes:
        created: every Job and JobSet that was accepted, as it was sent.
        started: every pod that was made, as it was made; after it is gone as well.
    """

    def __init__(self, folder: Path, secrets: Mapping[str, Mapping[str, str]]):
        self.created: list[Object] = []
        self.started: list[Object] = []
        self._secrets = secrets
        self._folder = folder
        self._image = pods.make_image(folder / "image")
        self._lock = threading.RLock()
        self._objects: dict[str, dict[tuple[str, str], Object]] = {plural: {} for plural in KINDS}
        self._containers: dict[str, pods.Container] = {}
        self._ends: dict[str, float] = {}

    def create(self, plural: str, namespace: str, sent: Object) -> Object:
        """Take an object as it is sent; its controllers start at once.

        Raises:
            InvalidError: it is of another kind, or breaks a rule of its own.
            ExistsError: its name is taken.
        """
        made = without_nulls(sent)
        if (made.get("apiVersion"), made.get("kind")) != KINDS[plural]:
            raise InvalidError(f"apiVersion, kind: {made.get('apiVersion')} {made.get('kind')} is none of {plural}")
        check(made)
        accepted = copy.deepcopy(made)
        with self._lock:
            self._keep(plural, namespace, made)
            self.created.append(accepted)
            if plural == "jobsets":
                self._make_jobs(made)
            self._settle()
            return copy.deepcopy(made)

    def get(self, plural: str, namespace: str, name: str) -> Object:
        with self._lock:
            self._settle()
            return copy.deepcopy(self._find(plural, namespace, name))

    def list(self, plural: str, namespace: str) -> list[Object]:
        with self._lock:
            self._settle()
            return [copy.deepcopy(made) for (where, _), made in self._objects[plural].items() if where == namespace]

    def patch(self, plural: str, namespace: str, name: str, change: Object) -> Object:
        """Merge ``change`` into an object."""
        with self._lock:
            made = self._find(plural, namespace, name)
            changed = merged(made, change)
            check({key: value for key, value in changed.items() if key != "status"})
            made.update(changed)
            self._settle()
            return copy.deepcopy(made)

    def delete(self, plural: str, namespace: str, name: str) -> Object:
        """Remove an object and all that it made. A running pod that is deleted counts as a failure of its Job."""
        with self._lock:
            made = self._find(plural, namespace, name)
            self._remove(plural, made)
            if plural == "pods" and made["status"]["phase"] in ALIVE:
                self._count(made, "failed")
            self._settle()
            return made

    def log(self, namespace: str, name: str) -> str:
        """What the pod has printed so far."""
        with self._lock:
            self._find("pods", namespace, name)
            return self.printed(name)

    def printed(self, name: str) -> str:
        """What a pod has printed so far, or had when it was deleted."""
        return self._containers[name].text() if name in self._containers else ""

    def close(self) -> None:
        """End all pods."""
        with self._lock:
            for kept in self._objects.values():
                kept.clear()
        for container in self._containers.values():
            container.kill()
            container.join()

    def _find(self, plural: str, namespace: str, name: str) -> Object:
        found = self._objects[plural].get((namespace, name))
        if found is None:
            raise MissingError(f'{plural} "{name}" not found')
        return found

    def _keep(self, plural: str, namespace: str, made: Object, owner: Object | None = None) -> None:
        """Give ``made`` its identity and its defaults, and store it."""
        version, kind = KINDS[plural]
        metadata = made["metadata"]
        name = metadata.setdefault("name", metadata.get("generateName", "") + random.token_hex(3)[:5])
        if (namespace, name) in self._objects[plural]:
            raise ExistsError(f'{plural} "{name}" already exists')
        metadata |= {"namespace": namespace, "uid": str(uuid.uuid4()), "creationTimestamp": pods.now()}
        if owner is not None:
            above = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "controller": True}
            metadata["ownerReferences"] = [above | {key: owner["metadata"][key] for key in ("name", "uid")}]
        made |= {"apiVersion": version, "kind": kind, "status": {}}
        if plural == "jobs":
            made["spec"] = {"parallelism": 1, "completions": 1, "backoffLimit": 6} | made["spec"]
        self._objects[plural][namespace, name] = made

    def _owned(self, plural: str, owner: Object) -> list[Object]:
        """What ``owner`` made, in the order it was made."""
        uid = owner["metadata"]["uid"]
        made = self._objects[plural].values()
        return [one for one in made if uid in [above["uid"] for above in one["metadata"].get("ownerReferences", [])]]

    def _remove(self, plural: str, made: Object) -> None:
        metadata = made["metadata"]
        self._objects[plural].pop((metadata["namespace"], metadata["name"]), None)
        for below in ("jobs", "pods"):
            for child in self._owned(below, made):
                self._remove(below, child)
        if plural == "pods" and metadata["name"] in self._containers:
            self._containers[metadata["name"]].kill()

    def _settle(self) -> None:
        """Let the controllers do what there is to do now."""
        for job in list(self._objects["jobs"].values()):
            self._settle_job(job)
        for jobset in list(self._objects["jobsets"].values()):
            self._settle_jobset(jobset)
        for plural in ("jobs", "jobsets"):
            for made in list(self._objects[plural].values()):
                ended, kept = self._ends.get(made["metadata"]["uid"]), made["spec"].get("ttlSecondsAfterFinished")
                if ended is not None and kept is not None and time.monotonic() >= ended + kept:
                    self._remove(plural, made)

    def _end(self, made: Object, kind: str, reason: str) -> None:
        made["status"]["conditions"] = [{"type": kind, "status": "True", "reason": reason, "message": ""}]
        self._ends[made["metadata"]["uid"]] = time.monotonic()

    def _settle_job(self, job: Object) -> None:
        spec, status = job["spec"], job["status"]
        if job["metadata"]["uid"] in self._ends:
            return
        left = spec["completions"] - status.get("succeeded", 0)
        if status.get("failed", 0) > spec["backoffLimit"]:
            self._end(job, "Failed", "BackoffLimitExceeded")
        elif left <= 0:
            self._end(job, "Complete", "CompletionsReached")
        wanted = 0 if "conditions" in status else min(spec["parallelism"], left)
        active = [pod for pod in self._owned("pods", job) if pod["status"]["phase"] in ALIVE]
        for pod in active[wanted:]:
            self._remove("pods", pod)
        for _ in range(wanted - len(active)):
            self._make_pod(job)
        status["active"] = wanted

    def _make_jobs(self, jobset: Object) -> None:
        """All at once and in their order, so that the first part's pods run before the second's are made."""
        name, namespace = jobset["metadata"]["name"], jobset["metadata"]["namespace"]
        for part in jobset["spec"]["replicatedJobs"]:
            for number in range(part.get("replicas", 1)):
                job = copy.deepcopy(part["template"])
                marks = {
                    f"{JOBSET}/jobset-name": name,
                    f"{JOBSET}/replicatedjob-name": part["name"],
                    f"{JOBSET}/replicatedjob-replicas": str(part.get("replicas", 1)),
                    f"{JOBSET}/job-index": str(number),
                    f"{JOBSET}/restart-attempt": "0",
                }
                job["metadata"] = {**job.get("metadata", {}), "name": f"{name}-{part['name']}-{number}"}
                job["spec"]["completionMode"] = "Indexed"
                for metadata in (job["metadata"], job["spec"]["template"].setdefault("metadata", {})):
                    for kind in ("labels", "annotations"):
                        metadata[kind] = metadata.get(kind, {}) | marks
                self._keep("jobs", namespace, job, jobset)
                self._settle_job(job)

    def _settle_jobset(self, jobset: Object) -> None:
        """Sum its Jobs up; one that failed fails it, and ends the others."""
        jobs, rows = self._owned("jobs", jobset), []
        if jobset["metadata"]["uid"] in self._ends:
            return
        for part in jobset["spec"]["replicatedJobs"]:
            mine = [job for job in jobs if job["metadata"]["labels"][f"{JOBSET}/replicatedjob-name"] == part["name"]]
            ends = [job["status"].get("conditions", [{"type": ""}])[0]["type"] for job in mine]
            active = sum(job["status"]["active"] > 0 for job in mine)
            row = {"name": part["name"], "active": active, "ready": active, "suspended": 0}
            rows.append(row | {"succeeded": ends.count("Complete"), "failed": ends.count("Failed")})
        jobset["status"]["replicatedJobsStatus"] = rows
        if any(row["failed"] for row in rows):
            self._end(jobset, "Failed", "FailedJobs")
            for job in jobs:
                if job["metadata"]["uid"] not in self._ends:
                    self._remove("jobs", job)
        elif sum(row["succeeded"] for row in rows) == len(jobs):
            self._end(jobset, "Completed", "AllJobsCompleted")

    def _make_pod(self, job: Object) -> None:
        metadata, pod = job["metadata"], copy.deepcopy(job["spec"]["template"])
        indexed = job["spec"].get("completionMode") == "Indexed"
        marks = {"job-name": metadata["name"], "batch.kubernetes.io/job-name": metadata["name"]}
        given = pod.setdefault("metadata", {})
        given["labels"] = given.get("labels", {}) | marks
        given["generateName"] = f"{metadata['name']}-0-" if indexed else f"{metadata['name']}-"
        if indexed:
            pod["spec"].setdefault("hostname", f"{metadata['name']}-0")
        pod["spec"] = {"serviceAccountName": "default", "nodeName": "loopback"} | pod["spec"]
        self._keep("pods", metadata["namespace"], pod, job)
        pod["status"] |= {"hostIP": pods.ADDRESS, "podIP": pods.ADDRESS}
        self._start(pod)
        self.started.append(copy.deepcopy(pod))

    def _start(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        try:
            variables = pods.variables_of(pod, self._image, self._secrets)
        except KeyError as error:
            message = f"secret {error} not found"
            pods.set_state(pod, "Pending", waiting={"reason": "CreateContainerConfigError", "message": message})
            return
        variables = {key: self._resolved(value) for key, value in variables.items()}
        started, folder = pods.now(), self._folder / "pods" / name

        def ended(code: int, reason: str) -> None:
            with self._lock:
                state = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": started}
                state |= {
                    "finishedAt": pods.now(),
                    "message": self.printed(name)[-pods.MESSAGE_CHARS :] if code else "",
                }
                pods.set_state(pod, "Failed" if code else "Succeeded", terminated=state)
                pod["status"] |= {"reason": reason} if reason else {}
                if (pod["metadata"]["namespace"], name) in self._objects["pods"]:
                    self._count(pod, "failed" if code else "succeeded")
                    self._settle()

        self._containers[name] = pods.Container(pod, folder, variables, ended)
        pods.set_state(pod, "Running", running={"startedAt": started})
        self._containers[name].watch()

    def _count(self, pod: Object, how: str) -> None:
        """Tell the Job of a pod how it ended."""
        (above,) = pod["metadata"]["ownerReferences"]
        job = self._objects["jobs"].get((pod["metadata"]["namespace"], above["name"]))
        if job is not None:
            job["status"][how] = job["status"].get(how, 0) + 1

    def _resolved(self, value: str) -> str:
        """``value`` with the cluster's names of pods replaced by their address: loopback has no such name service."""
        known = {
            f"{pod['spec']['hostname']}.{pod['spec']['subdomain']}.{namespace}.svc.cluster.local"
            for (namespace, _), pod in self._objects["pods"].items()
            if {"hostname", "subdomain"} <= pod["spec"].keys()
        }
        found = re.fullmatch(r"[\w.-]+\.svc\.cluster\.local", value)
        return pods.ADDRESS if found and value in known else value
