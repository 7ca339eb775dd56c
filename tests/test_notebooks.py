"""The notebooks' code runs as it stands, on a store that a tracker wrote."""

import json
from pathlib import Path

import mlflow
import pytest

from matvlm.tracking import Tracker

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_of(notebook: Path) -> str:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_runs_on_a_tracked_run(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    tracker = Tracker("notebook-run", tmp_path / "run", "matvlm")
    tracker.parent({"hybrid.ratio": "0.25"}, {"flow": "TrainFlow", "recipe": "easyvqa"})
    with tracker.step("distill[aligned]") as step:
        for update in range(1, 4):
            step.metrics({"loss": 1.0 / update}, update)
    tracker.summary({"accuracy/student": 0.5})
    tracker.finish("FINISHED")

    variables: dict = {}
    try:
        exec(compile(code_of(notebook), str(notebook), "exec"), variables)
    finally:
        mlflow.set_tracking_uri(None)  # what a notebook sets holds for the whole process

    assert "1 training runs" in capsys.readouterr().out
    assert variables["runs"]["metrics.accuracy/student"].tolist() == [0.5]
    (line,) = variables["axis"].lines
    assert line.get_xydata().tolist() == [[1.0, 1.0], [2.0, 0.5], [3.0, 1.0 / 3.0]]
