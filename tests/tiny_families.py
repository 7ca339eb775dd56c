"""A random model of each supported family, a few thousand parameters each, and inputs for it.

Every model is built from its own configuration class and has what the family is known for: biases that are not zero,
norms that are not one, sliding windows shorter than the test's sequences, heads wider than hidden size / heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]
VOCABULARY = 64
IMAGE_TOKEN = 60
VISION_START, VISION_END, VIDEO_TOKEN = 61, 62, 63
WINDOW = 5
"""Tokens of a sliding window, where the family has one."""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.3,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family, and what its forward needs besides tokens.

    Attributes:
        model_class: name of its class in transformers.
        config: the configuration's values; those of a VLM hold ``text_config`` and ``vision_config``.
        images: seed -> the inputs that hold the image of one sample; None for a text-only family.
        layers: those to replace in tests, of each kind that the family has at least one replaced and one kept.
        init: the start to test it with.
        types: name of the input that says of which kind each token is, if the family has one.
    """

    model_class: str
    config: dict[str, Any]
    images: Callable[[int], Inputs] | None = None
    layers: tuple[int, ...] = (0, 2)
    init: str = "aligned"
    types: str | None = None

    def build(self) -> PreTrainedModel:
        """The model in evaluation mode, float32; the same weights at every call."""
        model_class = getattr(transformers, self.model_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(model_class.config_class(**self.config))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero as transformers makes them, which would hide mistakes with biases
                    parameter.data.normal_(std=0.3)
                elif parameter.dim() == 1:  # norms
                    parameter.data += 0.3 * torch.randn(parameter.shape)
        model.generation_config.eos_token_id = None  # answers of one length
        model.generation_config.pad_token_id = 0
        model.generation_config.cache_implementation = None
        return model.eval()

    def sample(self, model: PreTrainedModel, length: int, seed: int = 0) -> Inputs:
        """One prompt of ``length`` random text tokens, for a VLM around those of an image."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, IMAGE_TOKEN, (1, length), generator=generator)
        images = {} if self.images is None else self.images(seed)
        if images:
            middle = [VISION_START, *[IMAGE_TOKEN] * image_tokens(model, images), VISION_END]
            ids = torch.cat([ids[:, :2], torch.tensor([middle]), ids[:, 2:]], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.token_types(ids, 0), **images}

    def token_types(self, ids: Tensor, answer: int) -> Inputs:
        """What the processor says of ``ids``, the last ``answer`` of which were generated.

        Prompt or answer (paligemma), text or image (the others).
        """
        if self.types is None:
            return {}
        is_paligemma = self.model_class.startswith("PaliGemma")
        kinds = torch.zeros_like(ids) if is_paligemma else (ids == IMAGE_TOKEN).long()
        kinds[:, kinds.shape[1] - answer :] = int(is_paligemma)
        return {self.types: kinds}


def batch(samples: list[Inputs]) -> Inputs:
    """``samples`` as one batch, the shorter ones padded on the left."""
    length = max(sample["input_ids"].shape[1] for sample in samples)

    def joined(name: str) -> Tensor:
        parts = [sample[name] for sample in samples]
        if name in ("input_ids", "attention_mask") or "type" in name:
            parts = [F.pad(part, (length - part.shape[1], 0)) for part in parts]
        return torch.cat(parts)

    return {name: joined(name) for name in samples[0]}


@torch.no_grad()
def image_tokens(model: PreTrainedModel, images: Inputs) -> int:
    """How many tokens ``model`` puts in the place of one sample's image."""
    features: Any = model.get_image_features(**images)
    features = getattr(features, "pooler_output", features)
    parts = list(features) if isinstance(features, list | tuple) else [features]
    return sum(part.shape[:-1].numel() for part in parts)


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _one_tile(seed: int) -> Inputs:
    return {"pixel_values": _pixels(seed, 1, 3, 16, 16)}


def _three_tiles(seed: int) -> Inputs:  # the whole image, then its halves
    return {"pixel_values": _pixels(seed, 1, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 32]])}


def _square(seed: int) -> Inputs:
    return {"pixel_values": _pixels(seed, 1, 3, 32, 32)}


def _square_and_size(seed: int) -> Inputs:
    return {**_square(seed), "image_sizes": torch.tensor([[32, 32]])}


def _listed_square(seed: int) -> Inputs:
    return {"pixel_values": _pixels(seed, 1, 1, 3, 32, 32)}


def _patches(seed: int) -> Inputs:
    return {"pixel_values": _pixels(seed, 4 * 6, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 6]])}


def _vlm(text: dict[str, Any], vision: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": False, **rest}


def _text(model_type: str, **values: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, "tie_word_embeddings": False, **values}


def _siglip(**values: Any) -> dict[str, Any]:
    return {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False, **values}


_PHI = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0, "partial_rotary_factor": 0.5}
_GEMMA = {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20}
_WINDOWS = {"sliding_window": WINDOW, "layer_types": ALTERNATING}
_GEMMA2 = {**_GEMMA, **_WINDOWS}
_LLAVA = {"image_token_id": IMAGE_TOKEN, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_QWEN_MARKS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}


def _idefics(name: str, model_type: str) -> Family:
    vision = {**VISION, "image_size": 32, "model_type": f"{model_type}_vision"}
    rest = {"image_token_id": IMAGE_TOKEN, "scale_factor": 2}
    return Family(f"{name}ForConditionalGeneration", _vlm(_text("llama"), vision, **rest), _listed_square)


FAMILIES: dict[str, Family] = {
    "phi": Family("PhiForCausalLM", {**TEXT, **_PHI}),
    "phi3": Family("Phi3ForCausalLM", {**TEXT, "sliding_window": WINDOW}),
    "llama": Family("LlamaForCausalLM", {**TEXT, "attention_bias": True}),
    "mistral": Family("MistralForCausalLM", {**TEXT, "sliding_window": WINDOW}),
    "qwen2": Family("Qwen2ForCausalLM", {**TEXT, **_WINDOWS, "use_sliding_window": True}, layers=(0, 1)),
    "qwen3": Family("Qwen3ForCausalLM", {**TEXT, "head_dim": 16}),
    "gemma": Family("GemmaForCausalLM", {**TEXT, **_GEMMA}),
    "gemma2": Family("Gemma2ForCausalLM", {**TEXT, **_GEMMA2}, layers=(0, 1)),
    "gemma3_text": Family("Gemma3ForCausalLM", {**TEXT, **_GEMMA2}, layers=(0, 1)),
    "smollm3": Family("SmolLM3ForCausalLM", {**TEXT, "no_rope_layers": [1, 0, 1, 0]}, layers=(0, 1)),
    "granite": Family("GraniteForCausalLM", {**TEXT, "attention_bias": True, "attention_multiplier": 0.2}),
    "olmo2": Family("Olmo2ForCausalLM", TEXT),
    "cohere": Family("CohereForCausalLM", {**TEXT, "logit_scale": 1.0}, init="paper"),
    "llava": Family("LlavaForConditionalGeneration", _vlm(_text("phi", **_PHI), _siglip(), **_LLAVA), _one_tile),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        _vlm(_text("mistral", sliding_window=WINDOW), _siglip(), **_LLAVA, **_PINPOINTS),
        _three_tiles,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        _vlm(_text("qwen2"), _siglip(), **_LLAVA, **_PINPOINTS, video_token_id=VIDEO_TOKEN),
        _three_tiles,
    ),
    "idefics3": _idefics("Idefics3", "idefics3"),
    "smolvlm": _idefics("SmolVLM", "smolvlm"),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        _vlm(
            _text("qwen2"),
            {**VISION, "image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"},
            image_token_id=IMAGE_TOKEN,
            downsample_ratio=0.5,
        ),
        _square,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _vlm(
            _text("qwen2_vl_text", rope_parameters=MROPE),
            {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2},
            **_QWEN_MARKS,
        ),
        _patches,
        types="mm_token_type_ids",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _vlm(
            _text("qwen2_5_vl_text", rope_parameters=MROPE),
            {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_heads": 2,
                "patch_size": 8,
                "window_size": 32,
                "fullatt_block_indexes": [1],
            },
            **_QWEN_MARKS,
        ),
        _patches,
        types="mm_token_type_ids",
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        _vlm(
            _text("gemma", **_GEMMA),
            _siglip(projection_dim=32),
            image_token_index=IMAGE_TOKEN,
            projection_dim=32,
        ),
        _one_tile,
        types="token_type_ids",
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        _vlm(
            _text("gemma3_text", **_GEMMA2),
            _siglip(),
            image_token_index=IMAGE_TOKEN,
            mm_tokens_per_image=4,
            boi_token_index=VISION_START,
            eoi_token_index=VISION_END,
            initializer_range=0.3,
        ),
        _one_tile,
        layers=(0, 1),
        types="token_type_ids",
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        _vlm(
            _text("mistral", head_dim=16),
            {**VISION, "image_size": 32, "head_dim": 8, "model_type": "pixtral"},
            image_token_index=IMAGE_TOKEN,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        _square_and_size,
    ),
}
