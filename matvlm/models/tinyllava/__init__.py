"""The paper's own models in the layout they were released in: TinyLLaVA teachers and MaTVLM students.

``tinyllava/TinyLLaVA-Phi-2-SigLIP-3.1B`` and ``hustvl/MaTVLM_0_25_Mamba2`` (arXiv 2503.13440) were saved by model code
of their own. Here they become transformers models: ``load`` in memory, ``convert`` on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaProcessor, PreTrainedModel

from matvlm.artifacts import Checkpoint
from matvlm.models import hybrid
from matvlm.models.mixer import Mamba2Mixer, MixerOptions
from matvlm.models.tinyllava.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration
from matvlm.models.tinyllava.processor import IMAGE, build_processor
from matvlm.models.tinyllava.release import MIXERS, parse_config, parse_mixers, read_config, read_mixers
from matvlm.models.tinyllava.weights import read_tensors

__all__ = [
    "MIXERS",
    "TinyLlavaConfig",
    "TinyLlavaForConditionalGeneration",
    "convert",
    "load",
    "mixer_layers",
    "parse_config",
    "parse_mixers",
    "skeleton",
]

INIT = "paper"
"""How the released students started (but without the attention's biases)."""


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, LlavaProcessor]:
    """Open a released checkpoint, teacher or student.

    On a CPU, weights that keep their dtype stay mapped to the files and are not copied into memory.

    Args:
        folder: local folder with config.json, safetensors and tokenizer files, and mamba_config.json for a student.
        dtype: of the weights; None keeps that of the token embeddings in the files.
        device: where to put them.

    Returns:
        A ``TinyLlavaForConditionalGeneration`` in evaluation mode, with mixers if it is a student, and its processor.

    Raises:
        ModelFolderError: a file is missing or damaged, a setting is not one of the released models', or a tensor is
            missing, unknown or of another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    processor = build_processor(folder, config)
    tokenizer = processor.tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    empty = skeleton(config, read_mixers(folder, config))
    tensors = read_tensors(folder, empty)
    build: Any = type(empty).from_pretrained
    model = build(
        None,
        config=empty.config,
        state_dict=tensors,
        dtype=dtype or tensors["model.language_model.embed_tokens.weight"].dtype,
    )
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), processor


def convert(folder: str | Path, destination: str | Path, source: str | None = None) -> Checkpoint:
    """Write the released checkpoint in ``folder`` as a model folder that ``matvlm.load`` opens.

    The weights keep their dtype. ``source`` says where the checkpoint is from, for the record; it defaults to
    ``folder``.

    Raises:
        ModelFolderError: as ``load`` does.
        StorageError: the disk is full or not writable; what was there before is still there.
    """
    model, processor = load(folder)
    layers = sorted(hybrid.mixers(model))
    layout = "MaTVLM" if layers else "TinyLLaVA"
    hybrid.save(model, processor, destination, {"source": source or str(folder), "source_layout": layout})
    return Checkpoint(
        uri=str(destination),
        label="student" if layers else "teacher",
        init=INIT if layers else None,
        layers=layers,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def mixer_layers(folder: Path) -> list[int]:
    """The Mamba-2 layers of the released checkpoint in ``folder``, none for a teacher; no weights are read.

    Raises:
        ModelFolderError: a JSON file is missing or damaged, or a setting is not one of the released models'.
    """
    return sorted(read_mixers(folder, read_config(folder)))


def skeleton(config: TinyLlavaConfig, mixers: Mapping[int, MixerOptions]) -> PreTrainedModel:
    """The model without values, on ``meta`` and in float32: class, config, names and shapes."""

    def make(_attention: nn.Module, layer: int) -> Mamba2Mixer:
        return Mamba2Mixer(mixers[layer], layer)

    with torch.device("meta"):
        model = TinyLlavaForConditionalGeneration(config)
        if mixers:
            hybrid.replace_(model, mixers, make, INIT)
    return model
