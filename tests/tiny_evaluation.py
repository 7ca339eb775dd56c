"""Untrained tiny VLMs whose answers differ from question to question, and questions about random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from PIL import Image

from matvlm.artifacts import Checkpoint
from matvlm.init import convert_
from matvlm.models import hybrid, small

SIZES = small.SmallVLM(
    image_size=32, vision_hidden=32, vision_layers=1, vision_heads=2, vision_mlp=64, hidden=32, layers=4, heads=2
)
WORDS = "is there a red green blue circle triangle shape what color in the image ? yes no big small round"
QUESTIONS = ["is there a red circle?", "what color?", "is there a blue triangle in the image?", "what shape is there?"]


def build_processor() -> Any:
    return small.build_processor(SIZES, small.build_tokenizer([WORDS]))


def build(processor: Any, mixers: tuple[int, ...] = (), seed: int = 0) -> Any:
    """A random model with weights so large that its answers differ by image and question."""
    model = small.build_model(SIZES, processor.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25, generator=generator)
    if mixers:
        convert_(model, list(mixers), "aligned", seed=0)
    return model


def save(folder: Path, label: str, mixers: tuple[int, ...] = (), seed: int = 0) -> Checkpoint:
    """Such a model on disk, whose answers come to an end."""
    processor = build_processor()
    model = build(processor, mixers, seed)
    with torch.no_grad():
        model.lm_head.weight[model.generation_config.eos_token_id] *= 2
    hybrid.save(model, processor, folder, {"init": "aligned", "layers": list(mixers)} if mixers else {})
    return Checkpoint(uri=str(folder), label=label, layers=list(mixers))


def random_images(count: int = 3) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(image.numpy()) for image in pixels]


def requests(images: list[Image.Image], **gen_kwargs: Any) -> list[Instance]:
    """Every question about every image."""
    settings = {"until": [], "max_gen_toks": 6, "do_sample": False} | gen_kwargs
    arguments = [(f"<image>{q}", settings, {"visual": [image]}) for image in images for q in QUESTIONS]
    return [Instance("generate_until", {"id": f"q{n}"}, argument, n) for n, argument in enumerate(arguments)]


def choices(images: list[Image.Image]) -> list[Instance]:
    """Continuations of different lengths to every question about every image."""
    said = [" yes", " no big small round", " red circle"]
    arguments = [(f"<image>{q}", word, {"visual": [image]}) for image in images for q in QUESTIONS for word in said]
    return [Instance("loglikelihood", {"id": f"q{n}"}, argument, n) for n, argument in enumerate(arguments)]
