"""Hybrids generate on a CUDA device: dynamic, static (compiled by transformers) and offloaded cache, bfloat16.

MAMBA_DETERMINISTIC=1 python -m pytest tests/gpu/test_generation_gpu.py
"""

from __future__ import annotations

import pytest
import tiny_models
import torch

from matvlm.init import convert_
from matvlm.models.hybrid import mixers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Measured on an H100, float32, logits up to 5.6: torch kernels 2.6e-6, Triton's prefill (TF32) 2.2e-3.
TOLERANCE = {"torch": 1e-4, "mamba_ssm": 1e-2}
NEW = 12


@pytest.fixture(scope="module", params=["torch", "mamba_ssm"])
def hybrid(request):
    if request.param == "mamba_ssm":
        pytest.importorskip("mamba_ssm")
    model = tiny_models.phi().cuda()
    convert_(model, [0, 2], "aligned", seed=1, kernels=request.param)
    return model, TOLERANCE[request.param]


def generate(model, **options):
    ids = tiny_models.token_ids(3, 20).cuda()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    result = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings, **options
    )
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"cache_implementation": "offloaded"}],
    ids=["dynamic", "static-compiled", "offloaded"],
)
def test_generation_equals_recomputing_everything(hybrid, options):
    model, tolerance = hybrid
    sequences, logits = generate(model, **options)
    expected_sequences, expected = generate(model, use_cache=False)
    worst = (logits - expected).abs().max().item()
    print(f"\n{options or 'dynamic'}: largest difference {worst:.1e} of logits up to {expected.abs().max().item():.1f}")
    assert worst < tolerance
    assert torch.equal(sequences, expected_sequences)


def test_static_cache_in_bfloat16_keeps_its_state_in_float32(hybrid):
    model, _ = hybrid
    half = tiny_models.phi().bfloat16().cuda()
    convert_(half, [0, 2], "aligned", seed=1, kernels=mixers(model)[0].kernels)
    static, dynamic = (generate(half, cache_implementation=kind)[1] for kind in ("static", "dynamic"))
    print(f"\nbfloat16: {(static[0] - dynamic[0]).abs().max().item():.1e}")
    assert (static[0] - dynamic[0]).abs().max() < 0.1
