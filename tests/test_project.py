"""What a stranger who clones the repository relies on: nothing machine-bound, pins that hold, commands that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LARGEST_FILE = 8 << 20
MACHINE_PATH = re.compile(r"(?<![\w.~}:/])/(?:root|home|work|Users|mnt|opt/wheels)/\w")


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """Every file that is tracked, or would be by ``git add .``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def test_no_file_is_large(repository_files: list[Path]) -> None:
    large = [path for path in repository_files if path.stat().st_size > LARGEST_FILE]
    assert large == []


def test_no_file_names_a_place_on_one_machine(repository_files: list[Path]) -> None:
    found = []
    for path in repository_files:
        content = path.read_bytes()
        if b"\0" in content[:4096]:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


def test_machine_paths_are_recognised() -> None:
    slash = "/"
    for text in ('open("@root/data")', "cd @home/jo/x", "`@work/x`", "=@Users/jo"):
        assert MACHINE_PATH.search(text.replace("@", slash)), text
    for text in ("a@home@b", "https:@@host@root@x", "~@root@x", "${HOME}@work@x", "@tmp@x"):
        assert not MACHINE_PATH.search(text.replace("@", slash)), text


def test_requirements_are_pinned_and_installed() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("another environment than the one that requirements.txt makes")
    wrong = []
    for requirement in requirements("requirements.txt"):
        pins = [pin for pin in requirement.specifier if pin.operator == "=="]
        installed = metadata.version(requirement.name).partition("+")[0]
        if len(pins) != 1 or not requirement.specifier.contains(installed):
            wrong.append(f"{requirement}: installed is {installed}")
    assert wrong == []


def test_pins_lie_in_the_ranges_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {requirement.name.lower(): requirement for requirement in requirements("requirements.txt")}
    ranges = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    for wanted in map(Requirement, ranges):
        pinned = pins[wanted.name.lower()]
        (pin,) = pinned.specifier
        assert wanted.specifier.contains(pin.version), f"{pinned} is outside {wanted}"


def test_gpu_packages_stay_out_of_requirements() -> None:
    gpu = {requirement.name for requirement in requirements("requirements-gpu.txt")}
    assert {"mamba-ssm", "causal-conv1d"} <= gpu
    assert gpu.isdisjoint(requirement.name for requirement in requirements("requirements.txt"))


def test_package_data_is_found_and_travels_in_a_wheel(tmp_path: Path) -> None:
    assets = ROOT / "matvlm" / "assets"
    data = [path for path in assets.rglob("*") if path.is_file()]
    data += (ROOT / "matvlm" / "evaluate" / "tasks").rglob("*.yaml")
    names = sorted(path.relative_to(ROOT).as_posix() for path in data)
    for name in names:
        assert files("matvlm").joinpath(name.removeprefix("matvlm/")).is_file()
    source = tmp_path / "source"
    shutil.copytree(ROOT / "matvlm", source / "matvlm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "matvlm").rglob("*.py")}
    assert code | set(names) <= packed


def make(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        ["make", "-n", "--always-make", *arguments],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_train_runs_the_recipe_with_its_overrides() -> None:
    plain = make("train").splitlines()[-1]
    assert plain == ("python flows/train_flow.py --config recipe flows/recipes/easyvqa.yaml run --max-workers 2")
    chosen = make("train", "RECIPE=debug", "SET=seed=1 distill.epochs=2").splitlines()[-1]
    assert chosen.startswith("python flows/train_flow.py --config recipe flows/recipes/debug.yaml run")
    assert chosen.endswith(' --set "seed=1 distill.epochs=2"')
    for name in re.findall(r"flows/\S+", plain + " " + chosen):
        assert (ROOT / name).is_file(), name


def test_make_test_checks_everything() -> None:
    commands = make("test")
    for step in ("-m venv .venv", "--requirement requirements.txt", "ruff check", "ruff format --check", "mypy"):
        assert step in commands
    assert 'pytest -m "not slow"' in commands.splitlines()[-1]


@pytest.mark.parametrize(("name", "user"), [("", "matvlm"), ("ada", "ada")])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has no name that Metaflow accepts")
def test_metaflow_has_a_user_name_even_for_root(tmp_path: Path, name: str, user: str) -> None:
    probe = tmp_path / "probe.mk"
    probe.write_text(f"include {ROOT}/Makefile\nprobe:\n\t@echo $$METAFLOW_USER\n")
    environment = {**os.environ, "METAFLOW_USER": name, "USER": "root", "MAKEFLAGS": "", "MAKELEVEL": "0"}
    command = ["make", "-f", str(probe), "probe"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == user


def test_ci_runs_make_test_from_any_folder() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    environment = {**os.environ, "MAKEFLAGS": "-n", "MAKELEVEL": "0"}
    done = subprocess.run(["bash", str(script)], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pytest" in done.stdout
