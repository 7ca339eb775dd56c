"""The library's layers: a file imports only from lower ones, and the heavy packages only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    {"config", "artifacts", "reporting"},
    {"recipes", "world", "storage", "progress", "phases", "processes", "recording", "kernels", "plots"},
    {"evaluate.tasks"},
    {"models", "data", "snapshots"},
    {"losses", "optimizer"},
    {"init", "teacher", "costs", "alignment"},
    {"targets", "sensitivity", "generation"},
    {"distill", "evaluate", "pretrain"},
    {"gate", "profiling"},
    {"tracking", "inspection", "report"},
    {"watch", "chat", "profile_command", "sweep"},
    {"cli"},
    {"__init__", "__main__"},
]
"""From low to high. A name is a file or package right below ``matvlm``; inside one package imports are free.

Tasks are apart from the rest of ``evaluate``, which runs them: lm-eval does too, alone, so they need next to nothing.
"""

LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
ONLY_IN = {"metaflow": set[str](), "mlflow": {"tracking"}}
"""Third-party package -> the parts of the library that may import it."""

OPTIONAL = ("mamba_ssm", "causal_conv1d", "triton")
WITH_TRITON = ("matvlm.kernels.decode.", "matvlm.generation.fused", "matvlm.generation.plan")
"""Modules that only a GPU uses, and that nothing else may import when it is imported."""
LATE = ("mlflow", "lm_eval", "metaflow", "deepspeed", "datasets", "matplotlib", "boto3", "transformers")
"""Too slow to import for a command that does not need them."""


def imported(source: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in ``source``, those inside functions included."""
    parents = ["matvlm", *source.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str:
    """Which of the names in ``LAYERS`` has ``module``, a dotted name below ``matvlm``."""
    first, _, rest = module.partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    return inner if inner in LAYER_OF else first


def violations(package: Path) -> list[str]:
    """``file:line: what is wrong`` for every forbidden import below the folder ``package``."""
    found = []
    for source in sorted(package.rglob("*.py")):
        place = source.relative_to(package)
        part = part_of(".".join(place.with_suffix("").parts))
        if part not in LAYER_OF:
            found.append(f"{place}:1: {part} has no layer; add it to LAYERS")
            continue
        for line, name in imported(source, package):
            top, _, rest = name.partition(".")
            if part not in ONLY_IN.get(top, {part}):
                found.append(f"{place}:{line}: {top} may not be imported in {part}")
            if top != "matvlm" or rest == "__version__":
                continue
            other = part_of(rest)
            if not (package / other.replace(".", "/")).is_dir() and not (package / f"{other}.py").is_file():
                other = "__init__"
            if other != part and LAYER_OF.get(other, 0) >= LAYER_OF[part]:
                found.append(f"{place}:{line}: {part} (layer {LAYER_OF[part]}) imports {name}, which is not below it")
    return found


def test_imports_go_down() -> None:
    assert violations(ROOT / "matvlm") == []


@pytest.mark.parametrize(
    ("place", "code", "complaint"),
    [
        ("storage.py", "from matvlm.models import hybrid", "storage (layer 1) imports matvlm.models.hybrid"),
        ("storage.py", "import matvlm.progress", "storage (layer 1) imports matvlm.progress"),
        ("storage.py", "def f():\n    from matvlm import tracking", "storage (layer 1) imports matvlm.tracking"),
        ("models/hybrid.py", "from ..losses import kl", "models (layer 3) imports matvlm.losses.kl"),
        ("models/deep/mixer.py", "from ... import losses", "models (layer 3) imports matvlm.losses"),
        ("losses.py", "from matvlm import load", "losses (layer 4) imports matvlm.load"),
        ("distill/loop.py", "def f():\n    import mlflow.tracking", "mlflow may not be imported in distill"),
        ("tracking.py", "from metaflow import current", "metaflow may not be imported in tracking"),
        ("helpers.py", "", "helpers has no layer"),
        ("evaluate/tasks/gqa/scorer.py", "from matvlm.evaluate import running", "imports matvlm.evaluate.running"),
        ("models/mixer.py", "import matvlm.evaluate.running", "models (layer 3) imports matvlm.evaluate.running"),
    ],
)
def test_the_checker_sees_a_violation(tmp_path: Path, place: str, code: str, complaint: str) -> None:
    good = {
        "config.py": "import yaml",
        "storage.py": "import matvlm.config",
        "progress.py": "import tqdm",
        "tracking.py": "import mlflow\nfrom matvlm import __version__",
        "losses.py": "from matvlm import models",
        "models/__init__.py": "from . import mixer\nfrom matvlm.storage import join\nfrom ..config import Recipe",
        "models/mixer.py": "from matvlm.models.hybrid import x\nfrom matvlm.evaluate.tasks.gqa.scorer import y",
        "evaluate/tasks/gqa/scorer.py": "from matvlm.evaluate.tasks import z",
    }
    for name, text in {**good, place: code}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = violations(tmp_path)
    assert complaint in found
    (tmp_path / place).write_text(good.get(place, ""))
    assert violations(tmp_path) == [] or place == "helpers.py"


def run_python(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_cuda_packages() -> None:
    output = run_python(
        "import importlib, pkgutil, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # None there makes an import of the name fail
        "import matvlm\n"
        "names = [m.name for m in pkgutil.walk_packages(matvlm.__path__, 'matvlm.')]\n"
        "for name in names:\n"
        f"    if not name.endswith('__main__') and not name.startswith({WITH_TRITON!r}):\n"
        "        importlib.import_module(name)\n"
        "print(len(names))"
    )
    assert int(output.splitlines()[-1]) >= 10


@pytest.mark.parametrize("module", ["matvlm", "matvlm.config", "matvlm.cli"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    loaded = run_python(f"import sys, {module}\nprint(*(name for name in {LATE!r} if name in sys.modules))").split()
    assert loaded == []
