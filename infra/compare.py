"""A teacher and two hybrids of it, evaluated, side by side on MLflow's compare page; and a picture of that page.

    python infra/compare.py        # writes infra/images/compare.png; 10 to 15 minutes on two cores

The runs are real: the recipe ``easyvqa`` trains a hybrid of 25 % and one of 50 %, and ``eval_flow.py`` evaluates both
and the teacher they come from on the recipe's own test questions. All is kept by a stack of its own (``stack.py``) and
deleted with it. Needs Chromium and its driver.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browser import headless
from stack import Stack

ROOT = Path(__file__).resolve().parents[1]
IMAGE = ROOT / "infra" / "images" / "compare.png"
RECIPE = ROOT / "flows" / "recipes" / "easyvqa.yaml"
TEACHER = "package://easyvqa-teacher"
RATIOS = {"hybrid-25": 0.25, "hybrid-50": 0.5}
SHORT = ("hybrid.compare_inits=[]", "evaluate.limit_comparisons=1", "profile.prompts=[256]", "profile.repeats=3")
"""Leaves out what the page does not show."""
SIZE = (1400, 1630)
PAGE_SECONDS = 90


def open_comparison(browser: Any, server: str, experiment_id: str, run_ids: Sequence[str], metric: str) -> str:
    """Open the page that compares these runs, of their parameters those that differ; returns its text.

    Raises:
        TimeoutException: ``metric`` does not come up in ``PAGE_SECONDS``.
    """
    from selenium.webdriver.support.wait import WebDriverWait

    chosen = {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    browser.get(f"{server}/#/compare-runs?{urllib.parse.urlencode(chosen)}")
    cell = f"//a[normalize-space()='{metric}']"
    WebDriverWait(browser, PAGE_SECONDS).until(lambda page: page.find_elements("xpath", cell))
    for label in ("Close", "Parameters - Show diff only"):  # the first is of a panel that opens by itself
        for button in browser.find_elements("css selector", f"button[aria-label='{label}']"):
            button.click()
    return str(browser.find_element("css selector", "body").text)


def flow(folder: Path, server: str, file: str, *words: str) -> None:
    """Run a flow with ``RECIPE`` in ``folder`` to its end, as somebody types it."""
    command = [sys.executable, str(ROOT / "flows" / file), "--config", "recipe", str(RECIPE), "run", *words]
    environment = os.environ | {"MLFLOW_TRACKING_URI": server, "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=folder, env=environment, check=True)


def make_runs(folder: Path, server: str) -> tuple[str, list[str]]:
    """Train and evaluate; the ids of the experiment and of the three evaluations."""
    from mlflow import MlflowClient

    models = {"teacher": TEACHER}
    for name, ratio in RATIOS.items():
        flow(folder, server, "train_flow.py", "--set", *SHORT, f"name=train-{name}", f"hybrid.ratio={ratio}")
        (student,) = folder.glob(f"runs/train-{name}-*/distill/aligned/model")
        models[name] = str(student)
    for name, model in models.items():
        flow(folder, server, "eval_flow.py", "--checkpoint", model, "--set", *SHORT, f"name={name}")
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("matvlm")
    assert experiment is not None
    query = "tags.flow = 'EvalFlow' and attributes.status = 'FINISHED'"
    found = client.search_runs([experiment.experiment_id], query, order_by=["attributes.start_time ASC"])
    return experiment.experiment_id, [run.info.run_id for run in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=5300, help="of MLflow; the S3 store gets the next one")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where the picture goes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compare-"))
    folder.chmod(0o755)  # Postgres does not run as root
    stack = Stack(folder / "stack", options.port)
    try:
        stack.up()
        experiment_id, run_ids = make_runs(folder, stack.url)
        with headless(folder / "profile", SIZE) as browser:
            open_comparison(browser, stack.url, experiment_id, run_ids, "easyvqa/accuracy")
            browser.save_screenshot(str(options.image))
    finally:
        stack.down()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.image}: {options.image.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
