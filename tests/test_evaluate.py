"""Evaluation: batched answers and likelihoods equal one-by-one ones, scores are counted right, bad input is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from PIL import Image

from matvlm.artifacts import Checkpoint
from matvlm.config import Evaluate
from matvlm.data.encoding import Encoder
from matvlm.evaluate import EvaluationError, compare_samples, easyvqa, evaluate, evenly_spaced, prefix
from matvlm.evaluate.harness import VLM
from matvlm.init import convert_
from matvlm.models import hybrid, small
from matvlm.reporting import Reporter

LOGLIKELIHOOD_TOLERANCE = 1e-5
"""Nats; batching changes the order of sums in fp32. Measured: at most 2.4e-7 over 5 seeds, at values down to -14."""

SIZES = small.SmallVLM(
    image_size=32, vision_hidden=32, vision_layers=1, vision_heads=2, vision_mlp=64, hidden=32, layers=4, heads=2
)
WORDS = "is there a red green blue circle triangle shape what color in the image ? yes no big small round"
QUESTIONS = ["is there a red circle?", "what color?", "is there a blue triangle in the image?", "what shape is there?"]


@pytest.fixture(scope="module")
def processor() -> Any:
    return small.build_processor(SIZES, small.build_tokenizer([WORDS]))


def build(processor: Any) -> Any:
    """A random model with weights so large that its answers differ by image and question."""
    model = small.build_model(SIZES, processor.tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model


@pytest.fixture(scope="module", params=["attention", "hybrid"])
def model(request: pytest.FixtureRequest, processor: Any) -> Any:
    model = build(processor)
    if request.param == "hybrid":
        convert_(model, [0, 2], "aligned", seed=0)
    return model


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def requests(images: list[Image.Image], **gen_kwargs: Any) -> list[Instance]:
    """Every question about every image."""
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False} | gen_kwargs
    arguments = [(f"<image>{q}", settings, {"visual": [image]}) for image in images for q in QUESTIONS]
    return [Instance("generate_until", {}, argument, n) for n, argument in enumerate(arguments)]


def one_by_one(model: Any, processor: Any, images: list[Image.Image]) -> list[str]:
    answers = []
    for image in images:
        for question in QUESTIONS:
            text = Encoder(processor).prompt(question)
            inputs = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            answers.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("shared", [True, False], ids=["shared prefix", "left padded"])
def test_answers_do_not_depend_on_batching(
    model: Any, processor: Any, images: list[Image.Image], shared: bool, batch_size: int, monkeypatch: Any
) -> None:
    expected = one_by_one(model, processor, images)
    assert len(set(expected)) >= 9, "answers that hardly differ would show nothing"
    if not shared:
        monkeypatch.setattr(prefix, "FAMILIES", frozenset())
    assert VLM(model, processor, batch_size).generate_until(requests(images)) == expected


def test_each_image_is_read_once(model: Any, processor: Any, images: list[Image.Image]) -> None:
    seen: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *call: seen.append(len(call[2].last_hidden_state)))
    VLM(model, processor, 8).generate_until(requests([*images, images[0].copy()]))
    hook.remove()
    assert seen == [len(images)]


def test_answer_ends_at_stop_string_and_length(model: Any, processor: Any, images: list[Image.Image]) -> None:
    full = VLM(model, processor, 8).generate_until(requests(images))
    stop = next(answer.split()[2] for answer in full if len(set(answer.split()[:3])) == 3)
    cut = VLM(model, processor, 8).generate_until(requests(images, until=[stop, "never said"]))
    assert cut == [answer.partition(stop)[0] for answer in full] != full
    short = VLM(model, processor, 8).generate_until(requests(images, max_gen_toks=2))
    assert all(whole.startswith(start) for whole, start in zip(full, short, strict=True))
    assert max(len(answer.split()) for answer in short) == 2


def test_loglikelihood_equals_direct_log_softmax(model: Any, processor: Any, images: list[Image.Image]) -> None:
    greedy = VLM(model, processor, 8).generate_until(requests(images[:1], max_gen_toks=2))
    cases = [(QUESTIONS[n], said) for n in range(3) for said in (greedy[n], " yes", " no big small round")]
    expected = [direct_score(model, processor, images[0], *case) for case in cases]
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    arguments = [(f"<image>{question}", said, {"visual": images[:1]}) for question, said in cases]
    for batch_size in (1, 4, 9):
        instances = [Instance("loglikelihood", {}, argument, n) for n, argument in enumerate(arguments)]
        scores = VLM(model, processor, batch_size).loglikelihood(instances)
        assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
        for (got, _), (want, _) in zip(scores, expected, strict=True):
            assert got == pytest.approx(want, abs=LOGLIKELIHOOD_TOLERANCE)


@torch.no_grad()
def direct_score(model: Any, processor: Any, image: Image.Image, question: str, said: str) -> tuple[float, bool]:
    """By one unpadded forward pass over prompt and continuation."""
    prompt = Encoder(processor).prompt(question)
    inputs = processor(text=[prompt], images=[image], return_tensors="pt", add_special_tokens=False)
    continuation = processor.tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = torch.cat([inputs["input_ids"], continuation], dim=1)
    logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -continuation.shape[1] - 1 : -1]
    chosen = logits.log_softmax(-1)[torch.arange(len(logits)), continuation[0]]
    return float(chosen.sum()), bool((logits.argmax(-1) == continuation[0]).all())


def test_requests_that_cannot_be_answered_are_refused(model: Any, processor: Any, images: list[Image.Image]) -> None:
    vlm = VLM(model, processor, 8)
    with pytest.raises(ValueError, match="greedy"):
        vlm.generate_until(requests(images, do_sample=True))
    with pytest.raises(ValueError, match="1 <image> marks but 2 images"):
        vlm.generate_until([Instance("generate_until", {}, ("<image>what?", {}, {"visual": images[:2]}), 0)])


class Parrot(LM):
    """Answers each easy-VQA question by ``answer(document)``."""

    MULTIMODAL = True

    def __init__(self, answer: Callable[[dict[str, Any]], str]):
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.answer(request.doc) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        raise NotImplementedError


def test_accuracies_are_counted_over_all_and_per_kind() -> None:
    """A model that knows the shapes and else says no: right on shape questions and where no is the answer."""
    task = easyvqa.task()
    assert len(task.eval_docs) == 9673
    assert len(set(task.eval_docs["image_id"])) == 1000
    shapes = ("circle", "rectangle", "triangle")
    parrot = Parrot(lambda doc: f" {doc['expected'].title()}.\n" if doc["expected"] in shapes else "no")
    chosen = evenly_spaced(9673, 400)
    results = evaluator.evaluate(parrot, {"tasks": {"easyvqa": task}}, samples={"easyvqa": chosen}, bootstrap_iters=0)
    expected = task.eval_docs.select(chosen)["expected"]
    no, yes, shape = (sum(answer in kind for answer in expected) for kind in (("no",), ("yes",), shapes))
    metrics = {name: value for name, value in results["results"]["easyvqa"].items() if name.startswith("accuracy")}
    assert min(no, yes, shape, 400 - no - yes - shape) >= 30
    assert metrics["accuracy,none"] == pytest.approx((no + shape) / 400)
    assert metrics["accuracy_yes_no,none"] == pytest.approx(no / (no + yes))
    assert metrics["accuracy_color,none"] == 0.0
    assert metrics["accuracy_shape,none"] == 1.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Teal", 1), (" teal.", 1), ("teal .", 1), ("teal..", 0), ("", 0), ("teal teal", 0), ("\x00\ufffd", 0), (".", 0)],
)
def test_answer_is_compared_after_normalising(answer: str, right: int) -> None:
    assert easyvqa.score({"expected": "teal"}, [answer]) == {"accuracy": right, "accuracy_color": right}


def test_limit_spreads_over_the_split() -> None:
    chosen = evenly_spaced(9673, 100)
    assert len(set(chosen)) == 100
    gaps = {after - before for before, after in zip(chosen, [*chosen[1:], 9673], strict=True)}
    assert gaps <= {96, 97}
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]


class Recorder(Reporter):
    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self.files: list[Path] = []
        self.last = (0, 0)

    def metrics(self, values: Any, step: int = 0) -> None:
        self.seen |= values

    def artifact(self, path: Path, folder: str = "") -> None:
        self.files.append(path)

    def progress(self, done: int, total: int) -> None:
        self.last = (done, total)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The untrained small VLM on disk, with a vocabulary that can answer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = small.build_processor(SIZES, small.build_tokenizer([WORDS]))
    hybrid.save(build(processor), processor, folder / "model", {})
    return Checkpoint(uri=str(folder / "model"), label="teacher")


def test_evaluate_writes_what_it_says(checkpoint: Checkpoint, tmp_path: Path) -> None:
    reporter = Recorder()
    result = evaluate(checkpoint, Evaluate(batch_size=16), 40, tmp_path / "out", reporter)
    rows = [json.loads(line) for line in Path(result.samples_uri).read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"easyvqa-{n}" for n in evenly_spaced(9673, 40)]
    assert result.num_questions == len(rows) == 40
    assert all(row["right"] == (easyvqa.normalise(row["answer"]) == row["expected"]) for row in rows)
    assert result.metrics["easyvqa/accuracy"] == sum(row["right"] for row in rows) / 40
    assert result.metrics.items() <= reporter.seen.items()
    assert reporter.last == (40, 40)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["metrics"] == result.metrics
    assert written["questions"] == {"easyvqa": {"asked": 40, "of": 9673}}
    assert "evenly spaced" in written["choice"]
    assert sorted(path.name for path in reporter.files) == ["results.json", "samples.jsonl"]


def test_unusable_checkpoint_or_task_is_one_clear_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def refused(uri: Path, match: str, **settings: Any) -> None:
        with pytest.raises(EvaluationError, match=match):
            evaluate(Checkpoint(uri=str(uri), label="x"), Evaluate(**settings), 4, tmp_path / "out", Reporter())

    refused(tmp_path / "absent", "absent: cannot open")
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(checkpoint.uri).iterdir():
        content = file.read_bytes()
        (cut / file.name).write_bytes(content[:2000] if file.suffix == ".safetensors" else content)
    refused(cut, "cut: cannot open")
    (cut / "config.json").write_text("{")
    refused(cut, "cut: cannot open")
    refused(Path(checkpoint.uri), "unknown task 'mme'; known are easyvqa", tasks=["mme"])
    assert not (tmp_path / "out").exists()


def sample_file(path: Path, answers: dict[int, str]) -> str:
    rows = [
        {"task": "easyvqa", "id": f"easyvqa-{n}", "image_id": str(n), "question": "what?", "expected": "teal"}
        | {"answer": answer, "right": answer == "teal"}
        for n, answer in answers.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_compared_samples_show_differences_and_agreement(tmp_path: Path) -> None:
    teacher = sample_file(tmp_path / "teacher.jsonl", dict.fromkeys(range(60), "teal"))
    answers = {n: "gray" if n % 10 == 0 else "teal" for n in range(40)}
    student = sample_file(tmp_path / "student.jsonl", answers)
    shown = compare_samples(teacher, student, n=6, seed=1)
    assert len(shown) == 6
    assert {s.id for s in shown} <= {f"easyvqa-{n}" for n in range(40)}
    differing = [s for s in shown if not s.student_right]
    assert [(s.teacher_answer, s.student_answer) for s in differing] == [("teal", "gray")] * 3
    assert Image.open(io.BytesIO(shown[0].png)).size == (64, 64)
    assert shown == compare_samples(teacher, student, n=6, seed=1)
    assert shown != compare_samples(teacher, student, n=6, seed=2)
    assert len(compare_samples(teacher, teacher, n=6, seed=1)) == 6
    assert len(compare_samples(teacher, student, n=100, seed=1)) == 40
