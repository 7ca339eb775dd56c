"""The engine on a GPU: recorded steps of every family, the decode kernels, and what they round.

python -m pytest tests/gpu/test_decode_gpu.py -s
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from family_table import hybrid_case, teacher_case
from tiny_families import FAMILIES, batch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from matvlm.generation import Engine, Sampling
from matvlm.init import convert_
from matvlm.kernels import has_decode_kernels
from matvlm.models.hybrid import mixers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NEW_TOKENS = 12
TOLERANCE = 1e-4
"""Of logits, float32 without TF32, as Euclidean norms relative to transformers' on a CPU."""
KNOWN = {"phi", "phi3", "llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "granite", "llava", "llava_next"}
KNOWN |= {"llava_onevision", "idefics3", "smolvlm", "internvl"}
"""Families that must have a plan: a few kernels a layer."""


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@torch.inference_mode()
def logits_of(model: PreTrainedModel, inputs, answer, engine: Engine | None = None):
    """[tokens, B, V] while the tokens of ``answer`` [B, tokens] are fed."""
    length = inputs["input_ids"].shape[1]
    session = (engine or Engine(model)).open(len(answer), length + answer.shape[1])
    session.prefill(inputs)
    steps = [session.step().float().cpu().clone()]
    for token in answer.T[:-1]:
        steps.append(session.step(token.to(model.device)).float().cpu().clone())
    return torch.stack(steps)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_recorded_steps_of_every_family(name: str, kind: str) -> None:
    case = {"plain": teacher_case, "hybrid": hybrid_case}[kind](name)
    for mixer in mixers(case.model).values():
        mixer.kernels = "torch"  # the prompt's scan by mamba-ssm rounds to TF32
    inputs = batch(case.prompts(9, 5))
    answer = torch.randint(3, 60, (2, NEW_TOKENS), generator=torch.Generator().manual_seed(0))
    expected = logits_of(case.model, inputs, answer)
    model = copy.deepcopy(case.model).cuda()
    engine = Engine(model)
    found = logits_of(model, {name: value.cuda() for name, value in inputs.items()}, answer, engine)
    difference = float((found - expected).norm() / expected.norm())
    print(f"{name} {kind}: {difference:.1e}, {'kernels' if engine.plan else 'own modules'}")
    assert difference < TOLERANCE
    assert engine.plan is not None or name not in KNOWN or not has_decode_kernels("cuda")


def big(name: str, hybrid: bool) -> PreTrainedModel:
    """Four layers as wide as those of real models: phi-2, llama with grouped heads, qwen3 with norms of heads."""
    text = {"vocab_size": 5000, "num_hidden_layers": 4, "max_position_embeddings": 8192, "initializer_range": 0.03}
    torch.manual_seed(0)
    if name == "phi":
        wide = {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 32,
            "partial_rotary_factor": 0.4,
        }
        model = PhiForCausalLM(PhiConfig(**text, **wide))
    else:
        wide = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
        kinds = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}
        model_class, config_class = kinds[name]
        more = {"head_dim": 128} if name == "qwen3" else {}
        model = model_class(config_class(**text, **wide, **more))
    if hybrid:
        convert_(model, [0, 2], "aligned")
    return model.eval()


@pytest.mark.parametrize("size", [1, 3, 16, 40])
@pytest.mark.parametrize("hybrid", [False, True], ids=["plain", "hybrid"])
@pytest.mark.parametrize("name", ["phi", "llama", "qwen3"])
def test_bfloat16_is_rounded_no_worse_than_by_the_models_own_modules(name: str, hybrid: bool, size: int) -> None:
    """Both against float32; prompts of several parts, and long enough for several programs a head."""
    model = big(name, hybrid)
    ids = torch.randint(5000, (size, 700 if size < 16 else 70), generator=torch.Generator().manual_seed(1))
    answer = torch.randint(5000, (size, NEW_TOKENS), generator=torch.Generator().manual_seed(2))
    exact = model.bfloat16().float().cuda()
    half = copy.deepcopy(exact).bfloat16()
    inputs = {"input_ids": ids.cuda()}
    with torch.inference_mode():
        whole = torch.cat([ids, answer], dim=1).cuda()
        rows = slice(ids.shape[1] - 1, -1)
        expected = exact(whole, use_cache=False).logits[:, rows].transpose(0, 1).float().cpu()
        own = half(whole, use_cache=False).logits[:, rows].transpose(0, 1).float().cpu()
    engine = Engine(half, chunk=256)
    assert engine.plan is not None
    found = logits_of(half, inputs, answer, engine)
    errors = [float((each - expected).norm() / expected.norm()) for each in (found, own)]
    print(f"{name} {'hybrid' if hybrid else 'plain'} batch {size}: engine {errors[0]:.1e}, own modules {errors[1]:.1e}")
    assert errors[0] < 1.3 * errors[1] + 2e-3


def test_greedy_and_drawn_answers_of_a_batch() -> None:
    case = hybrid_case("llava")
    inputs = batch(case.prompts(9, 5, 7))
    expected = case.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    engine = Engine(case.model.cuda())
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert engine.generate(on_gpu, sampling) == expected.tolist()
    drawn = [
        engine.generate(
            on_gpu, Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=0.9, seed=seed, ignore_eos=True)
        )
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
