"""A model as lm-eval sees it: batched answers and likelihoods equal one-by-one ones, and none is asked for twice."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from PIL import Image
from tiny_evaluation import QUESTIONS, build, build_processor, choices, random_images, requests, save

from matvlm.cli import main
from matvlm.data.encoding import Encoder
from matvlm.evaluate import EvaluationError, pictures, prefix, tasks
from matvlm.evaluate.adapter import CheckpointVLM
from matvlm.evaluate.answers import PREFIX, Answers
from matvlm.evaluate.harness import VLM
from matvlm.evaluate.scores import metrics_of
from matvlm.evaluate.tasks.easyvqa import scorer

LOGLIKELIHOOD_TOLERANCE = 1e-5
"""Nats; batching changes the order of sums in fp32. Measured: at most 2.4e-7 over 5 seeds, at values down to -14."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module", params=["attention", "hybrid"])
def model(request: pytest.FixtureRequest, processor: Any) -> Any:
    return build(processor, (0, 2) if request.param == "hybrid" else ())


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return random_images()


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


def opened(images: list[Image.Image], kind: str = "PNG") -> list[Image.Image]:
    """The images as files that are open and not decoded yet."""
    files = [io.BytesIO() for _ in images]
    for image, file in zip(images, files, strict=True):
        image.save(file, kind)
    return [Image.open(file) for file in files]


def test_images_are_decoded_for_their_batch_only(model: Any, processor: Any, images: list[Image.Image]) -> None:
    files = opened(images)
    assert VLM(model, processor, 5).generate_until(requests(files)) == one_by_one(model, processor, images)
    assert all(image.fp is not None for image in files), "an image that has been decoded has closed its file"
    assert len({pictures.key(image) for image in (*files, *opened(images))}) == len(images)


def test_questions_with_and_without_images_go_together(
    model: Any, processor: Any, images: list[Image.Image], monkeypatch: Any
) -> None:
    settings = {"until": [], "max_gen_toks": 4}
    arguments: list[Any] = [(question, settings) for question in QUESTIONS]
    arguments += [(f"<image>{question}", settings, {"visual": images[:1]}) for question in QUESTIONS]
    arguments += [(f"<image><image>{question}", settings, {"visual": images[:2]}) for question in QUESTIONS]
    instances = [Instance("generate_until", {}, argument, n) for n, argument in enumerate(arguments)]
    alone = [VLM(model, processor, 1).generate_until([instance])[0] for instance in instances]
    assert len(set(alone)) >= 6
    assert VLM(model, processor, 12).generate_until(instances) == alone


def test_an_image_that_cannot_be_read_costs_its_own_answers_only(
    model: Any, processor: Any, images: list[Image.Image], monkeypatch: Any
) -> None:
    files = opened(images)
    whole = pictures.encoded(files[1])
    assert whole
    files[1] = Image.open(io.BytesIO(whole[: len(whole) // 2]))
    expected = one_by_one(model, processor, images)
    expected[4:8] = [""] * 4
    for _ in ("shared prefix", "left padded"):
        vlm = VLM(model, processor, 5)
        assert vlm.generate_until(requests(files)) == expected
        assert sorted(vlm.unreadable) == ["q4", "q5", "q6", "q7"]
        assert "its image cannot be read" in vlm.unreadable["q4"]
        monkeypatch.setattr(prefix, "FAMILIES", frozenset())


class Counted(VLM):
    """Counts the questions that reach the model."""

    asked = 0

    def _generate(self, inputs: dict[str, Any], limits: Any) -> list[str]:
        self.asked += len(inputs["input_ids"])
        return super()._generate(inputs, limits)

    def _score(self, queries: Any, continuations: Any) -> Any:
        self.asked += len(queries)
        return super()._score(queries, continuations)


def test_kept_answers_are_not_asked_for_again(
    model: Any, processor: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    whole = VLM(model, processor, 4)
    answers, scores = whole.generate_until(requests(images)), whole.loglikelihood(choices(images))
    first = Counted(model, processor, 4, answers=Answers(tmp_path, {"model": "a"}))
    first.generate_until(requests(images)[:7])
    first.loglikelihood(choices(images)[:20])
    with (tmp_path / f"{PREFIX}0.jsonl").open("a") as file:
        file.write('{"answers": {"torn')
    for _ in range(2):
        again = Counted(model, processor, 4, answers=Answers(tmp_path, {"model": "a"}))
        assert again.generate_until(requests(images)) == answers
        assert again.loglikelihood(choices(images)) == [pytest.approx(score, abs=1e-5) for score in scores]
        assert again.asked in (12 - 7 + 36 - 20, 0)
    assert again.asked == 0
    assert again.answers.seconds > 0
    other = Counted(model, processor, 4, answers=Answers(tmp_path, {"model": "b"}))
    assert other.generate_until(requests(images)) == answers
    assert other.asked == 12


def test_lm_evals_own_cache_is_filled_batch_by_batch(
    model: Any, processor: Any, images: list[Image.Image], tmp_path: Path
) -> None:
    class Interrupted(Counted):
        def _generate(self, inputs: dict[str, Any], limits: Any) -> list[str]:
            if self.asked >= 8:
                raise KeyboardInterrupt
            return super()._generate(inputs, limits)

    first = Interrupted(model, processor, 4)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(first, str(tmp_path / "cache.db")).generate_until(requests(images))
    vlm = Counted(model, processor, 4)
    cached = CachingLM(vlm, str(tmp_path / "cache.db"))
    assert cached.generate_until(requests(images)) == VLM(model, processor, 4).generate_until(requests(images))
    assert vlm.asked == 12 - first.asked in range(1, 5)


def test_lm_evals_command_line_knows_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    checkpoint = save(tmp_path / "model", "student", (0, 2))
    run = ["lm-eval", "--model", "matvlm", "--tasks", "easyvqa", "--limit", "6", "--batch_size", "4"]
    assert (
        main([*run, "--model_args", f"checkpoint={checkpoint.uri},dtype=float32", "--output_path", str(tmp_path)]) == 0
    )
    (written,) = tmp_path.glob("**/results_*.json")
    results = json.loads(written.read_text())
    assert results["n-samples"]["easyvqa"] == {"original": 9673, "effective": 6}
    assert results["config"]["model"] == "matvlm"
    assert len(results["config"]["model_sha"]) == 64
    assert "|easyvqa|" in capsys.readouterr().out
    for wrong, message in (
        (f"checkpoint={tmp_path / 'absent'}", "absent: cannot open this checkpoint"),
        ("pretrained=x", "expected checkpoint=URI, dtype, device, batch_size; got pretrained"),
        (f"checkpoint={checkpoint.uri},dtype=float8", "dtype must be one of auto, float32, bfloat16, float16"),
        (f"checkpoint={checkpoint.uri},batch_size=auto", "batch_size must be a whole number of at least 1, got 'auto'"),
    ):
        with pytest.raises(EvaluationError, match=message):
            CheckpointVLM.create_from_arg_string(wrong, {"batch_size": 1, "device": "cuda:0"})


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
    task = tasks.build(["easyvqa"])["easyvqa"]
    assert len(task.eval_docs) == 9673
    assert len(set(task.eval_docs["image_id"])) == 1000
    shapes = ("circle", "rectangle", "triangle")
    parrot = Parrot(lambda doc: f" {doc['expected'].title()}.\n" if doc["expected"] in shapes else "no")
    chosen = tasks.evenly_spaced(task, 400)
    results = evaluator.evaluate(parrot, {"tasks": {"easyvqa": task}}, samples={"easyvqa": chosen}, bootstrap_iters=0)
    expected = task.eval_docs.select(chosen)["expected"]
    no, yes, shape = (sum(answer in kind for answer in expected) for kind in (("no",), ("yes",), shapes))
    metrics = {name: value for name, value in results["results"]["easyvqa"].items() if name.startswith("accuracy")}
    ours = metrics_of(task, results["samples"]["easyvqa"])
    assert ours == {name.partition(",")[0]: value for name, value in metrics.items() if "_stderr" not in name}
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
    assert scorer.score({"expected": "teal"}, [answer]) == {"accuracy": right, "accuracy_color": right}
