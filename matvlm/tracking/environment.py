"""What a run ran on, and a recipe as flat parameters."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matvlm.tracking.store import PARAM_LENGTH

PACKAGES = (
    "matvlm",
    "torch",
    "transformers",
    "datasets",
    "lm_eval",
    "deepspeed",
    "mamba-ssm",
    "causal-conv1d",
    "metaflow",
    "mlflow",
)


def environment() -> dict[str, str]:
    """Commit, versions and devices as parameters ``env.*``; what is not there is left out. Holds no secrets."""
    import torch

    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "devices": "cpu",
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found |= {"devices": ", ".join(names), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[f"version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {f"env.{name}": value for name, value in {**found, **_git()}.items()}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as ``{"distill.optimizer.lr": "0.0002"}``.

    Strings stay as they are, all else is written as JSON; what exceeds MLflow's length for a parameter is cut.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            flat[f"{prefix}{name}"] = cut(text)
    return flat


def cut(text: str) -> str:
    """``text`` as a parameter value MLflow takes; an ellipsis marks the cut."""
    return text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"


def _git() -> dict[str, str]:
    """Commit of the checkout this package is in, and whether it has local changes."""
    commit = _run_git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"git_commit": commit, "git_dirty": json.dumps(bool(_run_git("status", "--porcelain")))}


def _run_git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
