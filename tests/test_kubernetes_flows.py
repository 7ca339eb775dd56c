"""Flows with ``--with kubernetes``, from end to end: every pod is a process that has the code package and nothing else.

The story of the training flow is told once, for several tests: its distillation is a gang of two pods, of which one is
deleted, and the retry goes on from the snapshot; the pods of ``profile`` are deleted until the run fails; ``resume``
does the rest.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from flow_tools import FLOWS, WITH_DEBUG, Store, resume_commands
from kube.launch import IMAGE, Launcher, cluster, step_of
from kube.schema import Object, quantity

from matvlm.storage import exists, list_files, read_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KUBE = Path(__file__).parent / "kube"
TRAIN = FLOWS / "train_flow.py"
TWICE = ("teacher_targets", "distill_on_nodes", "profile")
ONCE = ("start", "prepare_data", "join_targets", "init_hybrid", "choose_nodes", "spread", "join_nodes", "collect")
PODS = Counter([*ONCE, "join_students", "list_models", "compare", *TWICE, *TWICE, "evaluate", "evaluate", "evaluate"])
"""Jobs and JobSets of the run that fails, by step: two of the targets' shards, two attempts at the distillation and at
``profile``."""
ASKING = {"teacher_targets", "init_hybrid", "distill_on_nodes", "evaluate", "profile"}
"""Steps whose pods get what the recipe's section ``resources`` asks for."""
MEMORY_MB, UPDATES = 5000, 20
RESOURCES = (
    f"resources.memory_mb={MEMORY_MB}",
    "resources.nodes=2",
    "resources.retries=1",
    "resources.retry_minutes=0",
)
PLACE = {
    "image": "matvlm:gpu-0.1.0",
    "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "shared_memory_mb": 256,
}
"""Of the distillation alone."""
TOKEN = "hf_known-to-the-tasks-alone"


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    with cluster(tmp_path, GREETING="good day") as made:
        yield made


def container(made: Object) -> Object:
    """The only one of a Job or pod."""
    spec = made["spec"]
    (found,) = (spec["template"]["spec"] if "template" in spec else spec)["containers"]
    return dict(found)


def test_a_foreach_a_retry_and_resources(launcher: Launcher) -> None:
    flow = launcher.start(KUBE / "hello_flow.py", "run", "--with", "kubernetes")
    assert flow.wait(300) == 0, flow.output
    jobs = launcher.api.cluster.created
    assert Counter(map(step_of, jobs)) == {"start": 1, "shout": 3, "join": 1, "end": 1}
    assert launcher.api.refused == []
    for made in jobs:
        resources, asking = container(made)["resources"], step_of(made) == "shout"
        wanted = (2, 5e9) if asking else (1, 4.096e9)
        assert tuple(float(quantity(resources["requests"][name])) for name in ("cpu", "memory")) == wanted
        assert resources["limits"] == ({"nvidia.com/gpu": "1"} if asking else {})
    assert "HELLO from t-" in flow.output
    assert "with good day" in flow.output
    kept = launcher.artifacts("HelloFlow", "said", "library", "home", "here")
    assert (kept["said"], kept["library"]) == (["HELLO", "WORLD"], None)
    assert kept["here"] == f"{kept['home']}/metaflow"
    homes = {str(path) for path in launcher.folder.glob("cluster/pods/*/home")}
    assert (len(homes), kept["home"] in homes) == (6, True)


def test_a_gang_step_is_a_jobset_whose_pods_compute_together(launcher: Launcher) -> None:
    """The first attempt fails in one of them, and the second one is of both."""
    flow = launcher.start(KUBE / "gang_flow.py", "run", "--with", "kubernetes", "--nodes", "2")
    assert flow.wait(300) == 0, flow.output
    assert Counter(map(step_of, launcher.api.cluster.started))["together"] == 4
    _, made = [one for one in launcher.api.cluster.created if one["kind"] == "JobSet"]
    parts = {part["name"]: part for part in made["spec"]["replicatedJobs"]}
    assert {name: part["replicas"] for name, part in parts.items()} == {"control": 1, "worker": 1}
    for part in parts.values():
        main, spec = container(part["template"]), part["template"]["spec"]["template"]["spec"]
        seen = {variable["name"]: variable.get("value") for variable in main["env"]}
        name = made["metadata"]["name"]
        assert seen["MF_MASTER_ADDR"] == f"{name}-control-0-0.{name}.matvlm-jobs.svc.cluster.local"
        assert (seen["MF_WORLD_SIZE"], spec["subdomain"]) == ("2", name)
        assert main["resources"]["limits"] == {"nvidia.com/gpu": "2"}
        assert {"mountPath": "/dev/shm", "name": "dhsm"} in main["volumeMounts"]
    kept = launcher.artifacts("GangFlow", "places", "printed")
    assert [(place["index"], place["nodes"], place["address"]) for place in kept["places"]] == [
        *((0, 2, "127.0.0.1"), (1, 2, "127.0.0.1"))
    ]
    assert kept["printed"] == ["rank 0 of 2: 11", "rank 1 of 2: 11"]


def test_an_interrupted_run_leaves_no_pod_behind(launcher: Launcher) -> None:
    flow = launcher.start(KUBE / "hello_flow.py", "run", "--with", "kubernetes")
    flow.wait_until(lambda: "Setting up task environment" in flow.output)
    os.killpg(flow.process.pid, signal.SIGINT)
    assert flow.wait(60) != 0
    assert launcher.pods("start") == []
    assert commands(launcher.folder / "cluster") == []


def commands(place: Path) -> list[list[str]]:
    """The words that started each process that works below a folder."""
    found = [process.info for process in psutil.process_iter(["cwd", "cmdline"])]
    return [one["cmdline"] for one in found if (one["cwd"] or "").startswith(str(place))]


@dataclass
class Story:
    launcher: Launcher
    codes: tuple[int, int]
    """Exit status of the run and of its continuation."""
    outputs: tuple[str, str]
    jobs: tuple[list[Object], list[Object]]
    snapshots: Counter[str]
    """Those that were whole when a pod of the distillation was deleted."""
    ranks: int
    """Processes that shared its work."""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("kubernetes")
    secret = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    with cluster(folder, **secret, HF_TOKEN=TOKEN) as launcher:
        launcher.keep_versions()
        words = ("run", "--with", "kubernetes", "--max-workers", "2")
        settings = (*RESOURCES, f"resources.steps.distill={json.dumps(PLACE)}")
        settings += ("distill.epochs=3", f"distill.max_updates={UPDATES}", f"distill.keep_checkpoints={UPDATES}")
        flow = launcher.start(TRAIN, *WITH_DEBUG, *words, "--set", *settings)
        flow.wait_until(lambda: bool(snapshots(launcher)))
        ranks = sum(command[1:4] == ["-m", "matvlm", "distill"] for command in commands(launcher.folder / "cluster"))
        assert len(launcher.delete_running("distill_on_nodes", at_most=1)) == 1
        done = snapshots(launcher)
        while flow.process.poll() is None:
            launcher.delete_running("profile")
            time.sleep(0.2)
        created = launcher.api.cluster.created
        first = list(created)
        resumed = launcher.start(TRAIN, *resume_commands(flow.output)[-1], log="resumed.txt")
        codes = (flow.wait(), resumed.wait())
        yield Story(launcher, codes, (flow.output, resumed.output), (first, created[len(first) :]), done, ranks)


def snapshots(launcher: Launcher) -> Counter[str]:
    """The whole ones, and how often each was written."""
    return Counter({name: count for name, count in launcher.versions().items() if name.endswith("/snapshot.json")})


def run_key(launcher: Launcher) -> str:
    """Of the only run."""
    tops = {name.split("/")[0] for name in list_files(f"{launcher.store}/metaflow/matvlm-runs")}
    (key,) = tops - {"snapshots"}
    return key


def test_every_step_is_a_pod_and_every_object_is_one_that_a_cluster_takes(story: Story) -> None:
    first, second = story.jobs
    assert story.launcher.api.refused == []
    assert story.codes[0] != 0
    assert Counter(map(step_of, first)) == PODS
    assert story.codes[1] == 0, story.outputs[1]
    assert [step_of(made) for made in second] == ["profile", "register", "end"]


def test_pods_ask_for_what_the_recipe_says(story: Story) -> None:
    for made in (*story.jobs[0], *story.jobs[1]):
        for spec in pod_specs(made):
            (main,) = spec["containers"]
            requests = main["resources"]["requests"]
            wanted = MEMORY_MB * 10**6 if step_of(made) in ASKING else 4096 * 10**6
            assert (quantity(requests["memory"]), quantity(requests["cpu"])) == (wanted, 1), step_of(made)
            assert spec["serviceAccountName"] == "tasks"
            if step_of(made) == "distill_on_nodes":
                assert (main["image"], spec["nodeSelector"]) == (PLACE["image"], PLACE["node_selector"])
                assert spec["tolerations"] == PLACE["tolerations"]
                assert {"mountPath": "/dev/shm", "name": "dhsm"} in main["volumeMounts"]
            else:
                assert (main["image"], spec.get("tolerations") or []) == (IMAGE, [])


def pod_specs(made: Object) -> list[Object]:
    """Of the pods of a Job or JobSet."""
    spec = made["spec"]
    jobs = [job["template"]["spec"] for job in spec["replicatedJobs"]] if made["kind"] == "JobSet" else [spec]
    return [dict(job["template"]["spec"]) for job in jobs]


def test_a_deleted_pod_of_a_gang_is_retried_and_goes_on_from_its_snapshot(story: Story) -> None:
    """No snapshot is written twice, and no update is in MLflow twice."""
    assert "Task is starting (retry)" in story.outputs[0]
    assert story.ranks == 2
    now = snapshots(story.launcher)
    assert 1 <= len(story.snapshots) < len(now) == UPDATES // 2 - 1
    assert set(now.values()) == {1}
    run = Store(story.launcher.folder).runs(run_key(story.launcher))["distill[aligned]"]
    assert [update for update, _ in Store(story.launcher.folder).curve(run, "loss")] == list(range(1, UPDATES + 1))


def test_nothing_of_the_run_stays_on_the_machines_of_its_pods(story: Story) -> None:
    """All hand-offs name files in the store, where they are."""
    launcher = story.launcher
    assert not list(launcher.folder.rglob("runs"))
    kept = launcher.artifacts("TrainFlow", "folder", "data", "targets", "students", "models", "results")
    assert kept["folder"] == f"{launcher.store}/metaflow/matvlm-runs/{run_key(launcher)}"
    uris = [kept["data"]["uri"], kept["targets"]["uri"], *(student["uri"] for student in kept["students"])]
    uris += [model["uri"] for model in kept["models"][1:]] + [result["samples_uri"] for result in kept["results"]]
    for uri in uris:
        assert uri.startswith(f"{kept['folder']}/")
        assert exists(uri), uri


def test_a_failed_run_is_continued_to_its_end(story: Story) -> None:
    failed, continued = story.outputs
    assert failed.rstrip().splitlines()[-1].split()[:3] == ["python", "flows/train_flow.py", "resume"]
    for kept in ("--with kubernetes", "--max-workers 2"):
        assert kept in failed.rstrip().splitlines()[-1]
    assert "| student | engine | 64 |" in continued
    assert "(matvlm version 1)" in continued
    runs = Store(story.launcher.folder).runs(run_key(story.launcher))
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


def test_cards_are_in_the_store(story: Story) -> None:
    place = f"{story.launcher.store}/metaflow/mf.cards"
    pages = {name: read_bytes(f"{place}/{name}") for name in list_files(place) if name.endswith(".html")}
    assert all(b"__MF_DATA__" in page for page in pages.values())
    made = Counter(name.split("/steps/")[1].split("/")[0] for name in pages)
    assert made == {"distill_on_nodes": 2, "evaluate": 3, "compare": 1, "profile": 1}
    assert "Card render failed" not in "".join(story.outputs)


def test_a_secret_stays_with_the_tasks(story: Story) -> None:
    """Not in the objects of the cluster, logs, the code package, artifacts, MLflow or the run's files."""
    launcher = story.launcher
    assert TOKEN not in str(launcher.api.cluster.created)
    read = 0
    for name in list_files(f"{launcher.store}/metaflow"):
        assert TOKEN.encode() not in read_bytes(f"{launcher.store}/metaflow/{name}"), name
        read += 1
    files = [path for path in launcher.folder.rglob("*") if path.is_file() and "image" not in path.parts]
    for path in files:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert read > 100
    assert {"mlflow.db", "log.txt", "mflog_stdout"} <= {path.name for path in files}
