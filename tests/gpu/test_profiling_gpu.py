"""Memory and stacks of the profiler on a GPU: ``python -m pytest tests/gpu`` on a machine that has one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from matvlm.config import Profile
from matvlm.init import convert_
from matvlm.profiling import compare, copy_bandwidth, profile_models, stack_gains
from matvlm.reporting import Reporter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STACKS = ["engine", "hf", "hf_static"]
SIZES = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
KV_BYTES = 2 * 512 * 2
"""Of one layer and token, in bfloat16."""


def model(layers: tuple[int, ...] = ()) -> Any:
    config = LlamaConfig(**SIZES, num_attention_heads=8, max_position_embeddings=1 << 20)
    made = LlamaForCausalLM(config)
    if layers:
        convert_(made, layers, "aligned", seed=0)
    return made.to("cuda", torch.bfloat16).eval()


def test_every_stack_is_measured_with_its_memory() -> None:
    models = [("teacher", model()), ("student", model((0, 2)))]
    settings = Profile(stacks=STACKS, prompts=[512, 8192], new_tokens=[32], batch_sizes=[2], repeats=2)
    result = profile_models(models, settings, Reporter())
    for p in result.points:
        assert p.measured is not None
        memory, kept = p.measured.memory, 2 if p.label == "student" else 4
        assert memory.kv >= 2 * kept * KV_BYTES * (p.prompt + 31)
        assert memory.weights == sum(w.numel() * w.element_size() for w in dict(models)[p.label].parameters())
        assert memory.peak_allocated is not None
        assert memory.peak_reserved is not None
        assert memory.rest is not None
        assert 0 <= memory.rest < memory.weights + 4 * memory.kv + 2**29
        assert memory.peak_reserved >= memory.peak_allocated
    assert {gain.best for gain in stack_gains(result)} <= {"hf", "hf_static"}
    assert all(row.peak_bytes is not None for row in compare(result))
    assert result.machine["gpu"] == torch.cuda.get_device_name()


def test_out_of_memory_is_a_row_and_its_memory_is_free_again() -> None:
    held = torch.cuda.mem_get_info()[0]
    too_many = held // (KV_BYTES * 4 * 4096) + 1  # sequences of 4,096 tokens for which the cache alone is too large
    settings = Profile(stacks=["engine", "hf"], prompts=[4096], new_tokens=[4], batch_sizes=[too_many, 1], repeats=1)
    result = profile_models([("x", model())], settings, Reporter())
    assert [(p.batch_size, p.measured is None) for p in result.points] == [(too_many, True), (1, False)] * 2
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] > held - 2**30


def test_the_bandwidth_is_that_of_the_devices_memory() -> None:
    assert 1e11 < copy_bandwidth(torch.device("cuda")) < 2e13
