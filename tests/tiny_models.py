"""Random models of a few thousand parameters for tests, with weights large enough that every layer matters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
)

from matvlm.init import convert_
from matvlm.models.hybrid import mixers

VOCABULARY = 61
IMAGE_TOKEN = 60
IMAGE_TOKENS = 4
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _phi_config() -> PhiConfig:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    return PhiConfig(**_TEXT, **dropouts, partial_rotary_factor=0.5, tie_word_embeddings=False)


def phi() -> PhiForCausalLM:
    """Phi: biases everywhere, rotary on half of each head."""
    return _seeded(PhiForCausalLM, _phi_config())


def llama() -> LlamaForCausalLM:
    """Llama: no biases, rotary on whole heads, two query heads per key/value head, embeddings tied to the head."""
    return _seeded(LlamaForCausalLM, LlamaConfig(**_TEXT, num_key_value_heads=2, tie_word_embeddings=True))


def llava() -> LlavaForConditionalGeneration:
    """LLaVA with a SigLIP tower of 4 patches and a Phi decoder, as in the paper."""
    vision = SiglipVisionConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_phi_config(),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    return _seeded(LlavaForConditionalGeneration, config)


def _seeded(model_class: type, config: object) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero as transformers makes them, which would hide mistakes with biases
                parameter.data.normal_(std=0.3)
    return model.eval()


def trained_hybrid(model: PreTrainedModel, layers: Sequence[int], init: str) -> PreTrainedModel:
    """``model`` with mixers for ``layers``, in place, as after training: nothing at its special starting value."""
    convert_(model, layers, init, seed=1, chunk_size=8)
    for index, mixer in mixers(model).items():
        generator = torch.Generator().manual_seed(index)
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random text token ids [batch, length], special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, IMAGE_TOKEN, (batch, length), generator=generator)


def vlm_inputs(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """An image's tokens, then ``length`` text tokens, for each of ``batch`` samples."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((batch, IMAGE_TOKENS), IMAGE_TOKEN)
    ids = torch.cat([image, token_ids(batch, length, seed)], dim=1)
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
