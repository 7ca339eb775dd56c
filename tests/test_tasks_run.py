"""Each task end to end through lm-eval, on small data in the benchmarks' own formats, with answers written here."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmark_choice
import benchmark_data
import benchmark_files
import pytest
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from openpyxl import load_workbook
from PIL import Image

from matvlm.evaluate import tasks

NAN = float("nan")
SINGLE = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class Scripted(LM):
    """Says what is written for a document's id, and remembers what it was asked."""

    MULTIMODAL = True

    def __init__(self, answers: Mapping[str, str]):
        super().__init__()
        self.answers, self.asked = answers, dict[str, tuple[str, dict[str, Any], list[Image.Image]]]()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        for request in requests:
            context, settings, multimodal = request.args
            assert context.count("<image>") == len(multimodal["visual"])
            self.asked[request.doc["id"]] = context, settings, multimodal["visual"]
        return [self.answers[request.doc["id"]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        raise NotImplementedError


ANSWERS: dict[str, list[str]] = {
    "pope": ["Yes", "yes", "No.", "no", "Yes, there is.", "There is not", "no", "yes"],
    "vqav2_val": ["Dark.", "two", "no", "A vase"],
    "vqav2_testdev": ["Dark.", "", "no", "A vase,"],
    "textvqa": ["Dakota.", "thursday", "$1.50"],
    "textvqa_ocr": ["Dakota.", "thursday", "$1.50"],
    "gqa": ["No.", "man", "gate"],
    "mme": ["Yes", "No", "yes.", "Yes", "No", "no", "y", "N"],
    "mmbench_en_dev": ["A", "B.", "(C)", "D", "B", "warm"],
    "mmbench_en_test": ["A", "B.", "", "D", "B", "\x07warm"],
    "mmvet": ["x = -1", "the left one", "a dog"],
    "scienceqa_img": ["B", "(A)", "E. gills"],
    "mmmu": ["B", "(B)", "It is 3.14159.", "C"],
}
"""By task, in the order of its documents."""

SCORES: dict[str, dict[str, float]] = {
    "pope": {
        "f1": (0.5 + 1 + 0) / 3,
        "right": 4 / 8,
        "accuracy_random": 0.5,
        "precision_random": 0.5,
        "recall_random": 0.5,
        "f1_random": 0.5,
        "yes_ratio_random": 0.5,
        **dict.fromkeys((f"{name}_popular" for name in ("accuracy", "precision", "recall", "f1")), 1.0),
        **dict.fromkeys((f"{name}_adversarial" for name in ("accuracy", "precision", "recall", "f1")), 0.0),
        "yes_ratio_popular": 0.5,
        "yes_ratio_adversarial": 0.5,
    },
    "vqav2_val": {
        "accuracy": (0.9 + 1 + 0.6 + 0.9) / 4,
        "accuracy_other": 0.9,
        "accuracy_number": 1.0,
        "accuracy_yes_no": 0.6,
    },
    "vqav2_testdev": {"answered": 0.75},
    "textvqa": {"accuracy": (1 + 0.3 + 0.9) / 3},
    "textvqa_ocr": {"accuracy": (1 + 0.3 + 0.9) / 3},
    "gqa": {"accuracy": 2 / 3},
    "mme": {
        "perception": 125.0 + 50.0,
        "cognition": 200.0,
        "right": 6 / 8,
        "color": 75.0 + 50.0,
        "artwork": 50.0,
        "code_reasoning": 200.0,
        **dict.fromkeys(("existence", "count", "position", "posters", "celebrity", "scene", "landmark", "OCR"), NAN),
        **dict.fromkeys(("commonsense_reasoning", "numerical_calculation", "text_translation"), NAN),
    },
    "mmbench_en_dev": {"circular_accuracy": 0.5, "right": 5 / 6},
    "mmbench_en_test": {"answered": 5 / 6},
    "mmvet": {
        "judged": 0.0,
        "correctness": NAN,
        **dict.fromkeys((f"correctness_{name}" for name in ("rec", "ocr", "know", "gen", "spat", "math")), NAN),
    },
    "scienceqa_img": {"accuracy": 2 / 3},
    "mmmu": {"accuracy": 3 / 4},
}
"""By task, worked out by hand from ``ANSWERS``."""

PROMPTS = {
    "pope": "<image>\nIs there a snowboard in the image?" + SINGLE,
    "vqav2_val": "<image>\nWhat color is the cat?" + SINGLE,
    "vqav2_testdev": "<image>\nWhat color is the cat?" + SINGLE,
    "textvqa": "<image>\nwhat is the brand of this camera?" + SINGLE,
    "textvqa_ocr": "<image>\nwhat is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + SINGLE,
    "gqa": "<image>\nIs it overcast?" + SINGLE,
    "mme": "<image>\nIs there a red coat in the image?" + SINGLE,
    "mmbench_en_dev": "<image>\nHere is a map.\nIdentify the colony shown.\nA. Maryland\nB. New Hampshire\n"
    "C. Rhode Island\nD. Vermont" + LETTER,
    "mmbench_en_test": "<image>\nHere is a map.\nIdentify the colony shown.\nA. Maryland\nB. New Hampshire\n"
    "C. Rhode Island\nD. Vermont" + LETTER,
    "mmvet": "<image>\nWhat is x in the equation?",
    "scienceqa_img": "<image>\nWhat is the capital?\nA. Albany\nB. Boston\nC. Dover" + LETTER,
    "mmmu": "<image> What is the total?\n\n(A) $6\n(B) $7\n(C) $8\n(D) $9\n" + LETTER,
}
"""The first question of each task, as LLaVA-1.5 asks it."""

LONG = ("mmbench_en_dev", "mmbench_en_test", "mmvet", "scienceqa_img")


@pytest.fixture(autouse=True)
def no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MATVLM_JUDGE_URL", raising=False)


def run(name: str, root: Path, limit: list[int] | None = None) -> tuple[dict[str, Any], Scripted, Any]:
    task = tasks.build([name], {name: str(root)})[name]
    ids = task.eval_docs["id"]
    lm = Scripted(dict(zip(ids, ANSWERS[name], strict=True)))
    chosen = {name: limit} if limit else None
    results = evaluator.evaluate(lm, {"tasks": {name: task}, "groups": {}}, samples=chosen, bootstrap_iters=0)
    return results, lm, task


@pytest.mark.parametrize(("name", "layout"), benchmark_data.LAYOUTS, ids="-".join)
def test_task_is_asked_and_scored_as_by_hand(name: str, layout: str, tmp_path: Path) -> None:
    results, lm, task = run(name, benchmark_data.write(name, tmp_path / "data", layout))
    metrics = {key.partition(",")[0]: value for key, value in results["results"][name].items() if key.endswith(",none")}
    metrics = {key: value for key, value in metrics.items() if not key.endswith("_stderr")}
    assert metrics == pytest.approx(SCORES[name], nan_ok=True)
    first = task.eval_docs[0]
    assert lm.asked[first["id"]][0] == PROMPTS[name]
    assert lm.asked[first["id"]][1]["max_gen_toks"] == (1024 if name in LONG else 128)
    assert lm.asked[first["id"]][1]["until"] == []
    for doc in task.eval_docs:
        assert doc["id"].startswith(f"{name}-")
        assert doc["image_id"]
        assert doc["question"] in lm.asked[doc["id"]][0].replace("<image>", "<image 1>") or "<image" in doc["question"]
    score = task.config.metadata.get("score")
    assert (score is None) == (name in ("vqav2_testdev", "mmbench_en_test"))
    assert score is None or score in metrics
    for sample in results["samples"][name]:
        judged = sample.get("right", sample.get(score, 0.0))
        assert 0.0 <= judged <= 1.0 or math.isnan(judged)
        json.dumps(sample, default=str)


@pytest.mark.parametrize("name", [name for name, layout in benchmark_data.LAYOUTS if layout == "original"])
def test_layouts_hold_the_same(name: str, tmp_path: Path) -> None:
    """The same documents and pixels from the hub's files as from the authors' own. ScienceQA has no ids on the hub."""
    seen = []
    for task, layout in benchmark_data.LAYOUTS:
        if task == name:
            root = benchmark_data.write(name, tmp_path / layout, layout)
            made = tasks.build([name], {name: str(root)})[name]
            pixels = [image.tobytes() for doc in made.eval_docs for image in made.doc_to_image(doc)]
            left = ("images", "id", "image_id") if name == "scienceqa_img" else ("images",)
            docs = [{key: value for key, value in doc.items() if key not in left} for doc in made.eval_docs]
            seen.append((docs, pixels))
    assert len(seen) >= 2
    assert all(each == seen[0] for each in seen)


def test_images_stand_at_their_marks(tmp_path: Path) -> None:
    """MMMU shows an image twice where its mark is there twice, and options may be images."""
    _, lm, _ = run("mmmu", benchmark_data.write("mmmu", tmp_path / "data"))
    context, _, images = lm.asked["mmmu-validation_Art_2"]
    assert context.startswith("Compare <image> with <image> and <image>.\n\n(A) a cat\n(B) a dog\n\nAnswer with")
    assert [image.tobytes() for image in images] == [images[n].tobytes() for n in (0, 1, 0)]
    context, _, images = lm.asked["mmmu-validation_Music_4"]
    assert context.startswith("Which is it?\n\n(A) <image>\n(B) <image>\n(C) <image>\n\n")
    assert len({image.tobytes() for image in images}) == 3
    assert lm.asked["mmmu-validation_Math_3"][0] == "How long is the side in <image>?\n" + SINGLE


def test_data_can_lie_on_s3_and_in_saved_data_sets(bucket: str, tmp_path: Path) -> None:
    import datasets

    from matvlm.storage import put

    original = benchmark_data.write("gqa", tmp_path / "data", "original")
    put(original, f"{bucket}/gqa")
    there = tasks.build(["gqa"], {"gqa": f"{bucket}/gqa"})["gqa"]
    assert there.eval_docs["target"] == ["no", "woman", "gate"]
    assert there.doc_to_image(there.eval_docs[2])[0].size == (benchmark_files.PIXELS,) * 2
    rows = datasets.load_dataset("parquet", data_dir=str(benchmark_data.write("mme", tmp_path / "mme")), split="test")
    rows.save_to_disk(tmp_path / "saved")
    saved = tasks.build(["mme"], {"mme": str(tmp_path / "saved")})["mme"]
    assert len(saved.eval_docs) == len(benchmark_choice.MME)
    assert saved.config.metadata["data"]["source"] == str(tmp_path / "saved")


def test_limit_keeps_what_is_scored_together(tmp_path: Path) -> None:
    mme = tasks.build(["mme"], {"mme": str(benchmark_data.write("mme", tmp_path / "mme"))})["mme"]
    chosen = tasks.evenly_spaced(mme, 4)
    assert chosen == [0, 1, 4, 5], "two images with both their questions"
    mmbench = {"mmbench_en_dev": str(benchmark_data.write("mmbench_en_dev", tmp_path / "mmbench"))}
    assert tasks.evenly_spaced(tasks.build(["mmbench_en_dev"], mmbench)["mmbench_en_dev"], 1) == [0, 1, 2, 3]
    easyvqa = tasks.build(["easyvqa"])["easyvqa"]
    assert tasks.evenly_spaced(easyvqa, 40) == [n * 9673 // 40 for n in range(40)]
    assert tasks.evenly_spaced(easyvqa, 10_000) == list(range(9673))


def test_cards_get_an_encoded_image(tmp_path: Path) -> None:
    mme = tasks.build(["mme"], {"mme": str(benchmark_data.write("mme", tmp_path / "mme"))})["mme"]
    kept, made = mme.eval_docs[6], mme.eval_docs[0]
    assert tasks.png(mme, kept) == benchmark_choice.mme_picture("0020.png"), "a PNG stays as it is"
    shown = Image.open(io.BytesIO(tasks.png(mme, made)))
    assert shown.format == "PNG"
    assert shown.tobytes() == mme.doc_to_image(made)[0].tobytes()


def submitted(name: str, tmp_path: Path) -> Path:
    _, lm, task = run(name, benchmark_data.write(name, tmp_path / "data"))
    rows = [{**doc, "answer": lm.answers[doc["id"]]} for doc in task.eval_docs]
    return tasks.SUBMISSIONS[name](rows, tmp_path)


def test_mmbench_submission_is_a_sheet(tmp_path: Path) -> None:
    header, *rows = load_workbook(submitted("mmbench_en_test", tmp_path)).active.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction")
    assert rows[0] == (241, "Identify the colony shown.", *benchmark_choice.MMBENCH[0][3], "A")
    assert [row[6] for row in rows] == ["A", "B.", None, "D", "B", "warm"], "without what a sheet may not hold"
    assert [row[0] for row in rows] == [row[0] for row in benchmark_choice.MMBENCH]
    header, *rows = load_workbook(submitted("mmbench_en_dev", tmp_path / "dev")).active.iter_rows(values_only=True)
    assert header[-1] == "answer"
    assert [row[-1] for row in rows] == ["A", "B", "C", "D", "B", "A"]


def test_vqav2_and_mmvet_submissions_are_json(tmp_path: Path) -> None:
    answers = json.loads(submitted("vqav2_testdev", tmp_path).read_text())
    assert answers == [
        {"question_id": id, "answer": answer}
        for id, answer in zip(range(1001, 1005), ["dark", "", "no", "vase"], strict=True)
    ]
    said = json.loads(submitted("mmvet", tmp_path / "mmvet").read_text())
    assert said == {"v1_0": "x = -1", "v1_1": "the left one", "v1_2": "a dog"}


DUMMY = """
import sys
sys.modules["matvlm"] = None  # an import of it fails
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
@register_model("dummy")
class Dummy(LM):
    MULTIMODAL = True
    def __init__(self, **settings): super().__init__()
    def generate_until(self, requests, disable_tqdm=False):
        assert all(image.size in ((32, 32), (64, 64)) for request in requests for image in request.args[2]["visual"])
        return ["yes" for _ in requests]
    def loglikelihood(self, requests): raise NotImplementedError
    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [-float(len(request.args[0].encode())) for request in requests]
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lm_eval_alone(folder: Path, names: Sequence[str], *more: str) -> dict[str, Any]:
    """The results of lm-eval's own command line on a copy of the tasks in ``folder``, where matvlm is not."""
    shutil.copytree(tasks.FOLDER, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "dummy.py").write_text(DUMMY)
    command = [sys.executable, "dummy.py", "run", "--model", "dummy", "--include_path", "tasks"]
    command += ["--tasks", ",".join(names), "--output_path", "out", "--log_samples", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (folder / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(written.read_text())
    assert set(results["results"]) == set(names)
    return results


LIMIT = 40
"""Questions of a task; more than the made-up benchmarks have."""


def test_lm_evals_own_command_line_runs_the_tasks_without_this_package(tmp_path: Path) -> None:
    """The model says yes to everything, and gives every byte of a text 1 nat."""
    given = benchmark_data.TASKS
    brought = sorted({*tasks.NAMES} - {*given})
    assert brought == ["easyvqa", "easyvqa_sentence", "python_docs"]
    roots = {name: str(benchmark_data.write(name, tmp_path / name)) for name in given}
    names = [*given, *brought]
    metadata = json.dumps({"data_root": roots})
    results = lm_eval_alone(tmp_path, names, "--limit", str(LIMIT), "--metadata", metadata)
    assert results["results"]["pope"]["yes_ratio_random,none"] == 1.0
    assert results["results"]["pope"]["recall_adversarial,none"] == 1.0
    assert results["results"]["mme"]["perception,none"] == 100.0
    assert results["versions"] == dict.fromkeys(names, 1.0)
    assert len(list((tmp_path / "out").rglob("samples_*.jsonl"))) == len(names)
    words, sentences, texts = (results["results"][name] for name in brought)
    assert 0 < words["accuracy,none"] < words["accuracy_yes_no,none"] < 1
    assert sentences["accuracy,none"] == 0.0
    assert texts["byte_perplexity,none"] == pytest.approx(math.e)
    assert texts["bits_per_byte,none"] == pytest.approx(1 / math.log(2))


def test_easyvqa_asks_for_sentences() -> None:
    """A model that has read the sentence, but for its last word, is right about nothing; one that has, about all."""
    task = tasks.build(["easyvqa_sentence"])["easyvqa_sentence"]
    chosen = tasks.evenly_spaced(task, 60)
    docs = [task.eval_docs[number] for number in chosen]
    for change, right in ((lambda text: f" {text.upper()}", 1.0), (lambda text: text.rpartition(" ")[0], 0.0)):
        lm = Scripted({doc["id"]: change(doc["sentence"]) for doc in docs})
        loaded = {"tasks": {"easyvqa_sentence": task}, "groups": {}}
        results = evaluator.evaluate(lm, loaded, samples={"easyvqa_sentence": chosen}, bootstrap_iters=0)
        metrics = results["results"]["easyvqa_sentence"]
        for name in ("accuracy", "accuracy_yes_no", "accuracy_color", "accuracy_shape"):
            assert metrics[f"{name},none"] == right
    words = tasks.build(["easyvqa"])["easyvqa"]
    for doc, number in zip(docs, chosen, strict=True):
        context, settings, images = lm.asked[doc["id"]]
        assert context == f"<image>{words.eval_docs[number]['question']} Answer in a sentence."
        assert (settings["max_gen_toks"], settings["until"], len(images)) == (24, ["\n"], 1)
