"""The whole pipeline with nothing but S3 to keep it: Metaflow's data, the teacher, the run's files and its snapshots.

The server fails often: errors of its own, requests to slow down, connections that end before or after it has obeyed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import s3_server
from flow_tools import WITH_DEBUG, Store, run_flow

from matvlm.distill.trainer import RESULT
from matvlm.models.locate import package_folder
from matvlm.storage import list_files, put, read_bytes, read_json
from matvlm.storage.part import LIST, LISTS
from matvlm.tracking import sync

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARE = 0.04
"""Of requests that fail. Metaflow and boto3 try each some eight times."""


def test_a_store_that_fails_now_and_then_loses_nothing(tmp_path: Path) -> None:
    with (
        s3_server.serve() as endpoint,
        s3_server.empty_bucket(endpoint, tmp_path / "cache") as store,
        s3_server.unreliable(endpoint, SHARE, seed=0) as proxy,
    ):
        teacher = f"{store}/models/teacher"
        put(package_folder("package://easyvqa-teacher"), teacher)
        variables = s3_server.variables(proxy.url, tmp_path / "cache") | {
            "METAFLOW_DEFAULT_DATASTORE": "s3",
            "METAFLOW_DATASTORE_SYSROOT_S3": f"{store}/metaflow",
            "METAFLOW_S3_ENDPOINT_URL": proxy.url,
        }
        words = ("run", "--max-workers", "2", "--set", f"teacher.model={teacher}", "evaluate.limit=8")
        code, output = run_flow(tmp_path, *WITH_DEBUG, *words, **variables)
        assert code == 0, output
        assert set(proxy.injected) == set(s3_server.FAULTS)
        assert "| student | engine | 64 |" in output
        runs = f"{store}/metaflow/matvlm-runs"
        tops = {name.split("/")[0] for name in list_files(runs)}
        (key,) = tops - {"snapshots"}
        check_parts(f"{runs}/{key}")
        result = read_json(f"{runs}/{key}/distill/aligned/{RESULT}")["checkpoint"]
        updates = range(1, result["updates"] + 1)
        shards = [name for name in list_files(f"{runs}/{key}/targets") if name.endswith(".safetensors")]
        kept = {name.split("/")[3] for name in list_files(f"{runs}/snapshots")}
    assert len(shards) == 2
    assert kept == {f"update-{update:06d}" for update in (2, 4)}
    assert not (tmp_path / "runs").exists()
    run = Store(tmp_path).runs(key)["distill[aligned]"]
    assert [update for update, _ in Store(tmp_path).curve(run, "loss")] == list(updates)


def check_parts(run: str) -> None:
    """Every file that the lists of a run name is there, and is the one that was sent; each part has its list."""
    names = list_files(f"{run}/{LISTS}")
    parts = {name.removesuffix(f"/{LIST}") for name in names}
    assert parts >= {"data", "distill/aligned", "report", "tracking/distill.0"}
    for name in names:
        assert name.endswith(f"/{LIST}"), f"{name} was left behind"
        part = name.removesuffix(f"/{LIST}")
        files = json.loads(read_bytes(f"{run}/{LISTS}/{name}"))["files"]
        assert sorted(files) == list_files(f"{run}/{part}")
        for file, said in files.items():
            content = read_bytes(f"{run}/{part}/{file}")
            assert (len(content), hashlib.sha256(content).hexdigest()) == (said["size"], said["sha256"]), file


def test_runs_on_s3_share_answers_and_are_synced_from_there(tmp_path: Path) -> None:
    """The second, on another machine, finds what the first has answered; MLflow may be told later, elsewhere."""
    with s3_server.serve() as endpoint, s3_server.empty_bucket(endpoint, tmp_path / "cache") as store:
        variables = s3_server.variables(endpoint, tmp_path / "cache") | {"MATVLM_RUNS": f"{store}/runs"}
        words = ("run", "--checkpoint", "package://easyvqa-teacher", "--set", "evaluate.limit=8")
        for machine in ("a", "b"):
            folder = tmp_path / machine
            folder.mkdir()
            given = variables | {"MATVLM_CACHE": str(folder / "cache")}
            code, output = run_flow(folder, *WITH_DEBUG, *words, flow="eval_flow.py", **given)
            assert code == 0, output
        keys = sorted({name.split("/")[0] for name in list_files(f"{store}/runs")} - {"evaluations"})
        times = [answer_times(f"{store}/runs/{key}/answers") for key in keys]
        assert [len(each) for each in times] == [2, 2]
        assert set(times[1]) <= set(times[0])  # teacher and student are one model here: the second to answer is found
        later = f"sqlite:///{tmp_path / 'later.db'}"
        assert sync(f"{store}/runs/{keys[0]}", later) > 10
        assert sync(f"{store}/runs/{keys[0]}", later) == 0


def answer_times(answers: str) -> list[str]:
    """What the tasks' records say of how long answering took: nobody takes as long twice."""
    return sorted(
        str(read_json(f"{answers}/{name}")["seconds"])
        for name in list_files(answers)
        if name.endswith("easyvqa/results.json")
    )
