"""A LLaVA small enough for a laptop: SigLIP-style tower, 2-layer MLP connector, Phi decoder with biases.

The same classes as the paper's TinyLLaVA-Phi-2-SigLIP-3.1B (arXiv 2503.13440), at about a thousandth of its size, with
a word-level tokenizer built from the texts it has to speak. ``matvlm.pretrain`` trains it; tests use it untrained.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PAD, EOS, UNK, IMAGE = "<pad>", "<eos>", "<unk>", "<image>"
SPEAKERS = ("USER:", "ASSISTANT:")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}<eos>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The paper's prompt format without its system sentence."""


class SmallVLM(BaseModel):
    """Sizes of the small VLM. Image sizes in pixels; ``rotary_share`` of each head's width carries rotary positions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image_size: int = 64
    patch_size: int = 16
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 512
    hidden: int = 128
    layers: int = 8
    heads: int = 4
    mlp: int = 512
    rotary_share: float = 0.5
    max_positions: int = 8192


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows every word and punctuation mark of ``texts``; other words become ``<unk>``."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    normalizer = normalizers.Lowercase()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = [PAD, EOS, UNK, IMAGE, *SPEAKERS, *sorted(words)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNK))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.add_tokens([AddedToken(speaker, normalized=False) for speaker in SPEAKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(sizes: SmallVLM, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that turns images and chat messages into the small VLM's inputs."""
    side = {"height": sizes.image_size, "width": sizes.image_size}
    image_processor = SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=sizes.patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(
    sizes: SmallVLM, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **text_overrides: Any
) -> LlavaForConditionalGeneration:
    """The randomly initialised model, fp32. ``text_overrides`` go to its ``PhiConfig``."""
    vision = SiglipVisionConfig(
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_size=sizes.vision_hidden,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        intermediate_size=sizes.vision_mlp,
        vision_use_head=False,
    )
    text = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.mlp,
        partial_rotary_factor=sizes.rotary_share,
        hidden_act="gelu_pytorch_tanh",  # Phi's gelu_new, fused
        max_position_embeddings=sizes.max_positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **text_overrides,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(sizes.image_size // sizes.patch_size) ** 2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model.eval()
