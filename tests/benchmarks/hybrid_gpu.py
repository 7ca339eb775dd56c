"""Is the hybrid sound at the paper's scale on a GPU? Random weights; forward and backward as distillation runs them.

    python tests/benchmarks/hybrid_gpu.py                # a CUDA machine with mamba-ssm and causal-conv1d
    python tests/benchmarks/hybrid_gpu.py --tiny --device cpu --kernels torch   # a rehearsal of the script

The architecture is TinyLLaVA-Phi-2-SigLIP-3.1B with 25 % of its layers Mamba-2. Frozen weights are bfloat16, what is
trained (mixers and connector) is float32, and autocast is bfloat16. It prints two tables: over many random batches
whether anything was not finite, and for a few of them the gradients by the chosen kernels against those by the torch
kernels in bfloat16, beside what bfloat16 itself costs: torch in bfloat16 against all of it in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PhiConfig, SiglipVisionConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matvlm.init import convert_
from matvlm.models.hybrid import mixers, trained_parameters
from matvlm.models.layers import choose_layers

IMAGE_TOKEN = 50295


def build_teacher(tiny: bool, device: str) -> LlavaForConditionalGeneration:
    """The paper's architecture, or a small one of its form, with random bfloat16 weights."""
    text = PhiConfig(
        vocab_size=51200,
        hidden_size=64 if tiny else 2560,
        intermediate_size=128 if tiny else 10240,
        num_hidden_layers=4 if tiny else 32,
        num_attention_heads=2 if tiny else 32,
        partial_rotary_factor=0.4 if not tiny else 0.5,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    vision = SiglipVisionConfig(
        image_size=56 if tiny else 384,
        patch_size=14,
        hidden_size=32 if tiny else 1152,
        num_hidden_layers=2 if tiny else 27,
        num_attention_heads=2 if tiny else 16,
        intermediate_size=64 if tiny else 4304,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlavaForConditionalGeneration(config).bfloat16().eval()


def build(tiny: bool, device: str, init: str) -> LlavaForConditionalGeneration:
    """The same with 25 % of the layers replaced, and what is trained in float32."""
    model = build_teacher(tiny, device)
    text = model.config.text_config
    convert_(model, choose_layers(text.num_hidden_layers, 0.25), init)
    for parameter in trained_parameters(model, train_connector=True).values():
        parameter.data = parameter.data.float()
    return model.train()


def random_batch(model: LlavaForConditionalGeneration, size: int, tokens: int, seed: int) -> dict[str, Tensor]:
    """``size`` samples of an image and random text, ``tokens`` in all; every second one is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    image_tokens = (vision.image_size // vision.patch_size) ** 2 - 1
    ids = torch.randint(0, 50000, (size, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for sample in range(size):
        pads = int(torch.randint(1, 64, (), generator=generator)) if sample % 2 else 0
        mask[sample, :pads] = 0
        ids[sample, pads : pads + image_tokens] = IMAGE_TOKEN
    pixels = torch.randn(size, 3, vision.image_size, vision.image_size, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    return {name: value.to(model.device) for name, value in batch.items()}


def gradients(
    model: nn.Module, batch: dict[str, Tensor], kernels: str, half: bool = True
) -> tuple[float, dict[str, Tensor]]:
    """The loss (cross-entropy of the last 64 tokens) and its gradient to everything trained."""
    for mixer in mixers(model).values():
        mixer.kernels = kernels
    model.zero_grad(set_to_none=True)
    device = batch["input_ids"].device.type
    with torch.autocast(device, torch.bfloat16) if half else nullcontext():
        inputs = batch if half else {**batch, "pixel_values": batch["pixel_values"].float()}
        logits = model(**inputs, use_cache=False, logits_to_keep=65).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, -64:].flatten())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def by_kind(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|actual - expected| / |expected| of all gradients of one kind together (Euclidean norms)."""
    sums: dict[str, list[float]] = {}
    for name, value in expected.items():
        kind = name.split("self_attn.")[-1] if "self_attn" in name else "connector"
        sums.setdefault(kind, [0.0, 0.0])
        sums[kind][0] += float((actual[name].double() - value.double()).pow(2).sum())
        sums[kind][1] += float(value.double().pow(2).sum())
    return {kind: (difference / size) ** 0.5 for kind, (difference, size) in sums.items() if size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default="mamba_ssm", choices=["mamba_ssm", "torch"])
    parser.add_argument("--inits", nargs="+", default=["aligned", "paper"])
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--compared", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    tokens = 96 if options.tiny else options.tokens
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; kernels {options.kernels}; "
          f"{options.batch_size} x {tokens} tokens, every second sample left-padded\n")  # fmt: skip
    soundness, comparison = [], {}
    for init in options.inits:
        model = build(options.tiny, options.device, init)
        bad, losses, norms, started = 0, [], [], time.perf_counter()
        for seed in range(options.batches):
            batch = random_batch(model, options.batch_size, tokens, seed)
            loss, grads = gradients(model, batch, options.kernels)
            norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
            bad += not (torch.isfinite(torch.tensor([loss, norm])).all() and len(grads) > 0)
            losses.append(loss)
            norms.append(norm)
        seconds = (time.perf_counter() - started) / options.batches
        soundness.append((init, options.batches, bad, min(losses), max(losses), min(norms), max(norms), seconds * 1e3))
        batches = [random_batch(model, options.batch_size, tokens, seed) for seed in range(options.compared)]
        chosen = [gradients(model, batch, options.kernels)[1] for batch in batches]
        half = [gradients(model, batch, "torch")[1] for batch in batches]
        model.float()
        exact = [gradients(model, batch, "torch", half=False)[1] for batch in batches]
        for column, (left, right) in enumerate([(chosen, half), (half, exact), (chosen, exact)]):
            each = [by_kind(a, b) for a, b in zip(left, right, strict=True)]
            for kind in each[0]:
                comparison.setdefault((init, kind), [0.0] * 3)[column] = statistics.mean(row[kind] for row in each)
    print("| init | batches | not finite | loss | gradient norm | ms a batch |\n|---|--:|--:|--:|--:|--:|")
    for init, count, bad, low, high, small, large, ms in soundness:
        print(f"| {init} | {count} | {bad} | {low:.2f} - {high:.2f} | {small:.2f} - {large:.2f} | {ms:.0f} |")
    print(f"\nRelative difference of the gradients, mean of {options.compared} batches:\n")
    print(
        f"| init | gradient of | {options.kernels} - torch, bf16 | torch bf16 - fp32 | {options.kernels} bf16 - fp32 |"
    )
    print("|---|---|--:|--:|--:|")
    for (init, kind), (kernel, noise, total) in comparison.items():
        print(f"| {init} | {kind} | {kernel:.1e} | {noise:.1e} | {total:.1e} |")


if __name__ == "__main__":
    main()
