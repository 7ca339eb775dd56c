"""``--with kubernetes`` where nothing, something and everything is set up, asked as a user would: by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flow_tools import DEBUG, FLOWS

FLOW = [sys.executable, str(FLOWS / "train_flow.py"), "--config", "recipe", str(DEBUG)]
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "here",
    "clusters": [{"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}],
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    "users": [{"name": "me", "user": {}}],
}


def refusal(folder: Path, *words: str, **settings: str) -> str:
    """What ``run`` says, that exits at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("METAFLOW_", "KUBE", "AWS_"))}
    env = {**kept, "HOME": str(folder), "METAFLOW_USER": "tests", **settings}
    done = subprocess.run([*FLOW, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert not list(folder.glob("runs*"))
    return done.stderr


def test_without_any_settings_one_message_says_what_to_set_and_where_it_is_described(tmp_path: Path) -> None:
    said = refusal(tmp_path, "run", "--with", "kubernetes")
    lines = said.strip().splitlines()
    assert lines[0] == "--with kubernetes: this is not set up yet:"
    for name in ("METAFLOW_DEFAULT_DATASTORE=s3", "METAFLOW_DATASTORE_SYSROOT_S3", "_CONTAINER_IMAGE", "KUBECONFIG"):
        assert sum(name in line for line in lines) == 1
    assert lines[-1].startswith("infra/README.md ")
    assert (FLOWS.parent / "infra" / "README.md").is_file()
    assert len(lines) == 6


@pytest.mark.parametrize("form", [["--with", "kubernetes:image=x:1,cpu=2"], ["--with=kubernetes:image=x:1"]])
def test_only_what_is_missing_is_named(tmp_path: Path, form: list[str]) -> None:
    path = tmp_path / "config"
    path.write_text(json.dumps(KUBECONFIG))
    store = {"METAFLOW_DEFAULT_DATASTORE": "s3", "KUBECONFIG": str(path)}
    said = refusal(tmp_path, "run", *form, **store)
    assert said.count("\n  ") == 1
    assert "METAFLOW_DATASTORE_SYSROOT_S3" in said


def test_a_run_elsewhere_needs_none_of_it(tmp_path: Path) -> None:
    said = refusal(tmp_path, "run", "--with", "retry", "--no-such-option")
    assert "no-such-option" in said
    assert "kubernetes" not in said
