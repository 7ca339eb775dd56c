"""Every family, every way to get logits: the table of what a hybrid can do, by the checks of test_families.

    python tests/family_table.py [FAMILY ...]

prints it as markdown. Each way's logits are compared with those of one forward without a cache over each sample on
its own. A cell says ``ok`` and the largest difference, or ``no`` and why; ``no, nor the teacher`` where the model
before its conversion cannot do it either.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_families import (
    FAMILIES,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Family,
    Inputs,
    batch,
)
from tiny_models import trained_hybrid
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer

from matvlm.models import hybrid

TOLERANCE = 1e-4
"""Largest difference measured between two ways to the same logits (up to 9): 3e-5. Padding not seen: 1 or more."""
NEW_TOKENS = 7


@dataclass(frozen=True)
class Case:
    """One model, hybrid or plain, and prompts for it."""

    family: Family
    model: PreTrainedModel

    def prompts(self, *lengths: int) -> list[Inputs]:
        return [self.family.sample(self.model, length, seed) for seed, length in enumerate(lengths)]

    @torch.no_grad()
    def recompute(self, prompt: Inputs, answer: Tensor) -> Tensor:
        """The logits [tokens of the answer, V] that each token of ``answer`` [tokens] was chosen from."""
        ids = torch.cat([prompt["input_ids"], answer[None]], dim=1)
        whole = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole |= self.family.token_types(ids, len(answer))
        return self.model(**whole, use_cache=False).logits[0, -len(answer) - 1 : -1]

    def generate(self, prompts: list[Inputs], **options: Any) -> Any:
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options}
        settings["suppress_tokens"] = [IMAGE_TOKEN, VISION_START, VISION_END, VIDEO_TOKEN]  # no text
        return self.model.generate(**batch(prompts), **settings, return_dict_in_generate=True)

    def difference(self, prompts: list[Inputs], **options: Any) -> float:
        """Largest difference between the logits while generating for ``prompts`` and those recomputed."""
        output = self.generate(prompts, **options)
        logits, answers = torch.stack(output.logits, dim=1), output.sequences[:, -NEW_TOKENS:]
        assert logits.shape[1] == NEW_TOKENS
        rows = zip(prompts, answers, logits, strict=True)
        return max(largest(row, self.recompute(prompt, answer)) for prompt, answer, row in rows)


def largest(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).abs().max().item()
    return float("inf") if difference != difference else difference


@torch.no_grad()
def forward(case: Case) -> float:
    """Samples in one batch, padded, against each on its own: one forward, no cache."""
    prompts = case.prompts(9, 14)
    inputs = batch(prompts)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if "PaliGemma" in case.family.model_class:
        positions = positions + 1
    if "Qwen2" not in case.family.model_class:  # mrope's positions are the model's own affair
        inputs["position_ids"] = positions
    logits = case.model(**inputs, use_cache=False).logits
    alone = [case.model(**prompt, use_cache=False).logits[0] for prompt in prompts]
    return max(largest(row[-len(one) :], one) for row, one in zip(logits, alone, strict=True))


def dynamic(case: Case) -> float:
    return case.difference(case.prompts(12, 12))


def static(case: Case) -> float:
    return case.difference(case.prompts(12, 12), cache_implementation="static")


def padding(case: Case) -> float:
    """Left padding, with either cache; the longest prompt is longer than a sliding window, the shortest is not."""
    prompts = case.prompts(4, 13)
    return max(case.difference(prompts), case.difference(prompts, cache_implementation="static"))


def beams(case: Case) -> float:
    """The score that beam search gave its best answer, which it got through all reordering of the cache."""
    prompts = case.prompts(7, 12)
    output = case.generate(prompts, num_beams=3, length_penalty=0.0, output_scores=True)
    worst = 0.0
    for prompt, sequence, score in zip(prompts, output.sequences, output.sequences_scores, strict=True):
        answer = sequence[-NEW_TOKENS:]
        chosen = case.recompute(prompt, answer).log_softmax(-1).gather(1, answer[:, None])
        worst = max(worst, largest(score, chosen.sum()))
    return worst


def sampling(case: Case) -> float:
    torch.manual_seed(3)
    return case.difference(case.prompts(7, 12), do_sample=True, temperature=0.8, top_k=20)


def chunked(case: Case) -> float:
    """Prefill in chunks shorter than the padding and than a sliding window, with either cache."""
    prompts = case.prompts(6, 14)
    dynamic = case.difference(prompts, prefill_chunk_size=3)
    return max(dynamic, case.difference(prompts, prefill_chunk_size=3, cache_implementation="static"))


def streaming(case: Case) -> float:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    (prompt,) = prompts = case.prompts(9)
    output = case.generate(prompts, streamer=streamer)
    answer = output.sequences[0, -NEW_TOKENS:]
    assert "".join(streamer).split() == tokenizer.decode(answer).split()
    return largest(torch.cat(output.logits), case.recompute(prompt, answer))


def compiled(case: Case, backend: str = "aot_eager") -> float:
    """``generate`` with a static cache and its decoding step as one graph, forward and autograd's tracing included."""
    torch._dynamo.reset()
    settings = CompileConfig(backend=backend, fullgraph=True, mode=None)
    settings._compile_all_devices = True
    prompts = case.prompts(4, 13)
    return case.difference(prompts, cache_implementation="static", compile_config=settings)


@torch.no_grad()
def save_and_load(case: Case) -> float:
    (prompt,) = case.prompts(9)
    with tempfile.TemporaryDirectory() as folder:
        hybrid.save(case.model, None, Path(folder) / "model", {})
        again, _ = hybrid.load(Path(folder) / "model")
    return largest(again(**prompt).logits, case.model(**prompt).logits)


WAYS: dict[str, Callable[[Case], float]] = {
    "forward": forward,
    "dynamic cache": dynamic,
    "static cache": static,
    "left padding": padding,
    "beam search": beams,
    "sampling": sampling,
    "chunked prefill": chunked,
    "streaming": streaming,
    "compile": compiled,
    "save/load": save_and_load,
}


def hybrid_case(name: str) -> Case:
    """The hybrid of a family, its mixers as after training: nothing at its special starting value."""
    case = teacher_case(name)
    trained_hybrid(case.model, case.family.layers, case.family.init)
    return case


def teacher_case(name: str) -> Case:
    return Case(FAMILIES[name], FAMILIES[name].build())


def attempt(way: Callable[[Case], float], case: Case) -> tuple[bool, str]:
    """Whether ``way`` works, and the cell that says how well or why not."""
    try:
        difference = way(case)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return difference < TOLERANCE, f"{difference:.0e}"


def cell(name: str, case: Case, way: str) -> str:
    works, said = attempt(WAYS[way], case)
    if works:
        return f"ok {said}"
    teacher_works, _ = attempt(WAYS[way], teacher_case(name))
    return f"no: {said}" if teacher_works else f"no, nor the teacher: {said}"


def table(names: list[str]) -> str:
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, float32 on CPU",
        "",
        f"| family | {' | '.join(WAYS)} |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for name in names:
        case = hybrid_case(name)
        lines.append(f"| {name} | {' | '.join(cell(name, case, way) for way in WAYS)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(sys.argv[1:] or list(FAMILIES)))
