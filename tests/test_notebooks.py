"""The notebooks' code runs as it stands, on what the library leaves, and they carry what it gave."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import easy_vqa
import mlflow
import pytest
import tiny_distill
import torch

import matvlm
from matvlm.artifacts import Checkpoint, ProfileResult, TaskScore
from matvlm.data.prepare import open_dataset
from matvlm.inspection.mixing import mean_distance, mixing_matrix, row_likeness
from matvlm.models.hybrid import decoder_layers, mixers
from matvlm.storage import write_json
from matvlm.sweep import PointResult, Summary
from matvlm.tracking import Tracker

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LARGEST_IMAGE = 60 << 10
SMALLER = {"[:40]": "[:8]", "epochs: 3": "epochs: 1", "max_updates: 30": "max_updates: 3", "limit: 100": "limit: 10"}
"""What ``bring_your_own`` does, and what is enough of it here."""


def cells_of(notebook: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str] | None = None) -> Any:
    """The variables that the notebook ``name`` leaves when its cells run in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = next(path for path in NOTEBOOKS if path.stem == name)
    code = "\n".join("".join(cell["source"]) for cell in cells_of(notebook))
    for before, after in (changes or {}).items():
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    variables: dict[str, Any] = {}
    try:
        exec(compile(code, str(notebook), "exec"), variables)
    finally:
        mlflow.set_tracking_uri(None)  # what a notebook sets holds for the whole process
    return variables


def track_training(folder: Path) -> None:
    tracker = Tracker("notebook-run", folder / "run", "matvlm")
    tracker.parent({"hybrid.ratio": "0.25"}, {"flow": "TrainFlow", "recipe": "easyvqa"})
    with tracker.step("distill[aligned]") as step:
        for update in range(1, 4):
            step.metrics({"loss": 1.0 / update}, update)
    tracker.summary({"accuracy/student": 0.5})
    tracker.finish("FINISHED")


def track_sweep(folder: Path, key: str, summary: Summary | None) -> None:
    """One that has come to its report, or, with None, one that failed in it."""
    tracker = Tracker(key, folder / key, "matvlm")
    tracker.parent({}, {"flow": "SweepFlow", "recipe": "study"})
    with tracker.step("report-like-point[0]") as step:
        step.metrics({"loss": 1.0})
    if summary is None:
        with pytest.raises(RuntimeError), tracker.step("report"):
            raise RuntimeError
    else:
        write_json(folder / "summary.json", summary.model_dump(mode="json"))
        with tracker.step("report") as step:
            step.artifact(folder / "summary.json", "report")
    tracker.finish("FINISHED" if summary else "FAILED")


def point(name: str, seed: int, layers: list[int], curve: list[tuple[int, float]]) -> PointResult:
    return PointResult(
        name=name,
        seed=seed,
        overrides={"hybrid.init": name, "hybrid.layers": layers},
        layers=layers,
        updates=curve[-1][0],
        seconds={"distill": 2.5},
        curve=curve,
        final_kl=curve[-1][1],
        scores={"easyvqa": TaskScore(metric="accuracy", value=90.0 + seed)},
        student=Checkpoint(uri="gone", label=name),
    )


def test_runs_are_compared_and_no_sweep_is_no_error(folder, monkeypatch, capsys):
    track_training(folder)
    variables = run("compare_runs", folder, monkeypatch)
    out = capsys.readouterr().out
    assert "1 training runs" in out
    assert "no finished sweep" in out
    assert variables["runs"]["metrics.accuracy/student"].tolist() == [0.5]
    (line,) = variables["axis"].lines
    assert line.get_xydata().tolist() == [[1.0, 1.0], [2.0, 0.5], [3.0, 1.0 / 3.0]]


def test_the_newest_finished_sweep_is_shown_and_its_best_points_named(folder, monkeypatch, capsys):
    points = [
        point("paper", 0, [0], [(0, 3.0), (5, 0.25)]),
        point("aligned", 0, [0], [(0, 1.0), (5, 0.5)]),
        point("aligned", 1, [0], [(0, 1.0), (5, 0.125)]),  # best of all, but not by the mean of its point
        point("halves", 0, [0, 2], [(0, 4.0), (5, 2.0)]),
        PointResult(name="broken", seed=0, overrides={"hybrid.ratio": 0.5}, error="out of memory"),
    ]
    teacher = PointResult(name="teacher", scores={"easyvqa": TaskScore(metric="accuracy", value=99.0)})
    profile = ProfileResult(points=[], machine={}, repeats=1, bandwidth=1.0)
    summary = Summary(sweep={}, environment={}, teacher=teacher, points=points, profile=profile)
    old = summary.model_copy(update={"points": points[:1]})
    track_sweep(folder, "old", old)
    track_sweep(folder, "newer", summary)
    track_sweep(folder, "failed", None)

    variables = run("compare_runs", folder, monkeypatch)
    table, out = variables["sweep"], capsys.readouterr().out
    assert table["point"].tolist() == ["teacher", "paper", "aligned", "aligned", "halves", "broken"]
    assert table["easyvqa"].tolist()[:5] == [99.0, 90.0, 90.0, 91.0, 90.0]
    assert table["final KL"].tolist()[1:5] == [0.25, 0.5, 0.125, 2.0]
    assert table["failed"].tolist()[-1] == "out of memory"
    assert re.findall(r"(\d) layers: (\w+), ([\d.]+)", out) == [("1", "paper", "0.2500"), ("2", "halves", "2.0000")]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in variables["curves"].lines}
    assert drawn["aligned, seed 1"] == [[0.0, 1.0], [5.0, 0.125]]
    assert len(drawn) == 4


def test_a_layer_is_shown_as_the_library_sees_it(tmp_path, monkeypatch, capsys):
    stage = tiny_distill.make_stage(tmp_path / "made")
    run_folder = tmp_path / "runs" / "tiny"
    shutil.copytree(stage.student.uri, run_folder / "init" / "paper")
    stage.run(run_folder / "distill" / "paper")
    (tmp_path / "runs" / "unfinished" / "distill" / "paper").mkdir(parents=True)

    found = run("inside_a_layer", tmp_path, monkeypatch)
    assert "tiny, init paper" in capsys.readouterr().out
    assert found["layers"] == tiny_distill.REPLACED
    student, _ = matvlm.load(str(run_folder / "distill" / "paper" / "model"))
    teacher, _ = matvlm.load(stage.teacher.uri)
    assert (found["inputs"]["input_ids"] == student.config.image_token_id).any()
    for layer in found["layers"]:
        attention, scan = (mixing_matrix(model, layer, found["inputs"]) for model in (teacher, student))
        row = found["by_head"].loc[(layer, 1)]
        assert row["distance", "teacher"] == pytest.approx(float(mean_distance(attention)[1]))
        assert row["distance", "after"] == pytest.approx(float(mean_distance(scan)[1]))
        assert row["likeness", "after"] == pytest.approx(float(row_likeness(attention, scan)[1]))
        assert row["likeness", "before"] != row["likeness", "after"]
        off = found["by_layer"].loc[layer]
        for name, model in (("before", found["untrained"]), ("after", student)):
            assert off[f"output off, {name}"] == pytest.approx(
                output_off(teacher, model, layer, found["inputs"]), rel=1e-4
            )
        assert off["output off, before"] != pytest.approx(off["output off, after"], rel=1e-2)


@torch.no_grad()
def output_off(teacher: Any, student: Any, layer: int, inputs: dict[str, torch.Tensor]) -> float:
    """How far the mixer is from the attention when both get what the attention gets; relative to the attention."""
    mixer, found = mixers(student)[layer], []

    def compare(_module: Any, _args: Any, kwargs: Any, output: Any) -> None:
        theirs = mixer(hidden_states=kwargs["hidden_states"], position_embeddings=kwargs["position_embeddings"])[0]
        found.append(float((theirs - output[0]).norm() / output[0].norm()))

    attention = decoder_layers(teacher)[layer].self_attn
    with attention.register_forward_hook(compare, with_kwargs=True):
        teacher(**inputs, use_cache=False)
    return found[0]


def test_without_a_run_a_layer_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="make train"):
        run("inside_a_layer", tmp_path, monkeypatch)


def test_own_data_and_teacher_become_a_student_that_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # so that TMPDIR is read
    threads = torch.get_num_threads()
    found = run("bring_your_own", tmp_path, monkeypatch, SMALLER)
    torch.set_num_threads(threads)
    (project,) = tmp_path.glob("my-hybrid-*")
    model, _ = matvlm.load(str(project / found["student"].uri))
    assert sorted(mixers(model)) == found["student"].layers == [0, 4]
    assert found["student"].updates == 3
    assert [step for step, _ in found["points"]] == [1, 2, 3]
    questions, answers, images = easy_vqa.get_train_questions()
    first = [(q, a) for q, a, image in zip(questions, answers, images, strict=True) if image == 0]
    kept = [row["turns"] for row in open_dataset(found["job"].data) if row["id"].startswith("0-")]
    assert [(turn["question"], turn["answer"]) for turns in kept for turn in turns] == first
    assert found["said"]
    assert set(found["scores"]) == {"teacher", "untrained", "student"}
    assert found["scores"]["teacher"] == 100.0
    assert "2 of 8 decoder layers become Mamba-2" in capsys.readouterr().out


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_carries_its_outputs(notebook):
    cells = cells_of(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    images = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert images
    assert max(len(base64.b64decode(image)) for image in images) <= LARGEST_IMAGE
    text = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not re.search(r"(?<![\w<:/.])/[a-z]\w*/", text)  # no place on the machine that it ran on
