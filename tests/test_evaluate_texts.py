"""Log-likelihoods of texts: those of one forward pass a text, cut as lm-eval cuts, and a task that is made of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tiny_evaluation
import tiny_families
import torch
from lm_eval.api.instance import Instance

from matvlm.config import Evaluate
from matvlm.evaluate import compare_samples, evaluate, tasks, texts
from matvlm.evaluate.answers import Answers
from matvlm.evaluate.harness import VLM
from matvlm.evaluate.results import RESULTS
from matvlm.reporting import Reporter

TOLERANCE = 2e-6
"""Relative, in fp32. Measured over 5 seeds: at most 3.8e-7, at values down to -860."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_evaluation.build_processor()


@pytest.fixture(scope="module", params=["attention", "hybrid"])
def model(request: pytest.FixtureRequest, processor: Any) -> Any:
    return tiny_evaluation.build(processor, (0, 2) if request.param == "hybrid" else ())


def some_texts(*lengths: int) -> list[str]:
    words, generator = tiny_evaluation.WORDS.split(), torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(words), (length,), generator=generator).tolist() for length in lengths]
    return [" ".join(words[number] for number in text) for text in drawn]


def instances(said: list[str]) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {"id": f"t{n}"}, (text,), n) for n, text in enumerate(said)]


@torch.no_grad()
def direct(model: Any, tokenizer: Any, text: str) -> float:
    """By one forward pass over the whole text, in float64 from the logits on."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = torch.tensor([[start, *tokenizer(text)["input_ids"]]])
    logits = model(input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1])).logits
    return float(logits[0].double().log_softmax(-1).gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_text_has_the_likelihood_of_one_forward_pass(model: Any, processor: Any, batch_size: int) -> None:
    said = [*some_texts(30, 1, 200, 64, 65, 7), ""]
    expected = [direct(model, processor.tokenizer, text) if text else 0.0 for text in said]
    assert min(expected) < -300
    got = VLM(model, processor, batch_size).loglikelihood_rolling(instances(said))
    assert got == pytest.approx(expected, rel=TOLERANCE)


def test_windows_are_those_of_lm_evals_own_model(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST_WINDOW", 16)
    monkeypatch.setattr(texts, "HEAD_POSITIONS", 5)
    said = some_texts(15, 16, 3, 24, 32, 50, 17)
    pytest.importorskip("accelerate", reason="lm-eval's own model needs it")
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(model, tokenizer=processor.tokenizer, backend="causal", max_length=16, batch_size=2)
    expected = theirs.loglikelihood_rolling(instances(said), disable_tqdm=True)
    assert VLM(model, processor, 4).loglikelihood_rolling(instances(said)) == pytest.approx(expected, rel=TOLERANCE)
    whole = [direct(model, processor.tokenizer, text) for text in said]
    cut = [abs(all - part) > 1e-3 for all, part in zip(whole, expected, strict=True)]
    assert cut[:-1] == [False, False, False, True, True, True]


def test_a_window_has_no_more_tokens_than_the_model_positions(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_evaluation.build(processor), list[tuple[int, ...]]()
    (text,) = some_texts(40)
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: seen.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    for positions, windows in ((8192, (1, 40)), (10, (4, 10))):
        model.config.get_text_config().max_position_embeddings = positions
        VLM(model, processor, 8).loglikelihood_rolling(instances([text]))
        assert seen.pop() == windows
    hook.remove()


def test_texts_start_with_bos_or_else_eos() -> None:
    processor = tiny_evaluation.build_processor()
    tokenizer = processor.tokenizer
    model, said = tiny_evaluation.build(processor), some_texts(9)
    found = []
    for start in (tokenizer.eos_token, "red"):
        tokenizer.bos_token = None if start == tokenizer.eos_token else start
        found += VLM(model, processor, 1).loglikelihood_rolling(instances(said))
        assert found[-1] == pytest.approx(direct(model, tokenizer, said[0]), rel=TOLERANCE)
    assert abs(found[0] - found[1]) > 1e-3
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        VLM(model, processor, 1).loglikelihood_rolling(instances(said))


@pytest.mark.parametrize("family", ["paligemma", "gemma3", "qwen2_vl", "idefics3"])
def test_later_tokens_of_a_text_change_nothing_before(family: str) -> None:
    """Also in families that see a prompt or an image in both directions."""
    model, ids = tiny_families.FAMILIES[family].build(), list(range(5, 25))
    whole = texts.Window(0, ids[:-1], ids[1:])
    halves = [texts.Window(0, ids[:-1], ids[10:]), texts.Window(0, ids[:9], ids[1:10])]
    with torch.inference_mode():
        together, parts = texts._score(model, [whole]), texts._score(model, halves)
    assert sum(together) == pytest.approx(sum(parts), rel=1e-5)


def test_kept_likelihoods_are_not_computed_again(
    processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said, seen = tiny_evaluation.build(processor), some_texts(9, 5, 20, 9), list[str]()
    likelihoods = texts.log_likelihoods

    def counted(model: Any, tokenizer: Any, texts: list[str], batch_size: int) -> list[float]:
        seen.extend(texts)
        return likelihoods(model, tokenizer, texts, batch_size)

    monkeypatch.setattr("matvlm.evaluate.harness.log_likelihoods", counted)
    expected = VLM(model, processor, 2).loglikelihood_rolling(instances(said))
    seen.clear()
    VLM(model, processor, 2, answers=Answers(tmp_path, {"model": "a"})).loglikelihood_rolling(instances(said[:2]))
    again = VLM(model, processor, 2, answers=Answers(tmp_path, {"model": "a"}))
    assert again.loglikelihood_rolling(instances([*said, said[3]])) == pytest.approx(expected + expected[3:], rel=1e-6)
    assert sorted(seen) == sorted(said), "each once, also those that are there twice"


def test_perplexity_of_pythons_documentation(processor: Any, tmp_path: Path) -> None:
    """The metrics of a task without score and images, by hand from the written likelihoods and the texts themselves."""
    settings, found = Evaluate(tasks=["python_docs", "easyvqa"], batch_size=4), []
    for label, mixers in (("teacher", ()), ("student", (0, 2))):
        model = tiny_evaluation.save(tmp_path / label, label, mixers)
        found.append(evaluate(model, settings, 5, tmp_path / f"of-{label}", Reporter()))
    result = found[1]
    written = json.loads((Path(result.samples_uri).parent / "python_docs" / RESULTS).read_text())
    lines = Path(result.samples_uri).read_text().split("\n")[:-1]
    rows = [row for row in map(json.loads, lines) if row["task"] == "python_docs"]
    names = [name for n, name in enumerate(sorted(topics)) if n in {k * len(topics) // 5 for k in range(5)}]
    assert [row["id"] for row in rows] == [f"python_docs-{name}" for name in names]
    assert [row["question"] for row in rows] == [topics[name] for name in names]
    assert {(row["target"], row["score"], row["right"], row["image_id"]) for row in rows} == {(None,) * 4}

    nats = -sum(float(row["answer"]) for row in rows)
    words = sum(len(re.split(r"\s+", topics[name])) for name in names)
    octets = sum(len(topics[name].encode()) for name in names)
    metrics = {name: value for name, value in result.metrics.items() if name.startswith("python_docs/")}
    assert metrics == pytest.approx(
        {
            "python_docs/word_perplexity": math.exp(nats / words),
            "python_docs/byte_perplexity": math.exp(nats / octets),
            "python_docs/bits_per_byte": nats / octets / math.log(2),
        },
        rel=1e-6,
    )
    assert set(result.scores) == {"easyvqa"}
    assert result.failed == {}
    assert written["score"] is None
    assert written["data"]["source"].startswith("pydoc topics of Python 3.")
    assert {sample.task for sample in compare_samples(found[0].samples_uri, result.samples_uri, 10, 0)} == {"easyvqa"}


def test_the_topics_are_all_there_are() -> None:
    task = tasks.build(["python_docs"])["python_docs"]
    assert task.eval_docs["id"][:] == [f"python_docs-{name}" for name in sorted(topics)]
    assert task.config.metadata["data"]["questions"] == len(topics) > 70
    assert "score" not in task.config.metadata
