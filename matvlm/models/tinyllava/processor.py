"""Images and chat messages -> the model's inputs, as the released models had them in their training."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from transformers import CodeGenTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from matvlm.models.folder import ModelFolderError
from matvlm.models.tinyllava.model import TinyLlavaConfig

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for message in messages %}"
    "{% set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string"
    " else message['content'] %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in parts %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in parts %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in parts %}{{ part['text'] }}{% endfor %}<|endoftext|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""TinyLLaVA's prompt for Phi; an image comes before the question, wherever in the message it is."""


def build_processor(folder: Path, config: TinyLlavaConfig) -> LlavaProcessor:
    """The processor for the released checkpoint in ``folder``, with an image token after its tokenizer's last one.

    Images are resized to the tower's square, bicubically and without padding, and scaled to [-1, 1].

    Raises:
        ModelFolderError: there is no usable tokenizer, or the model's vocabulary has no row left for the image token.
    """
    side = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=_tokenizer(folder, config.text_config.vocab_size),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def _tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ModelFolderError(f"{folder}: no tokenizer there: neither tokenizer.json nor vocab.json with merges.txt")
    try:
        tokenizer = CodeGenTokenizer.from_pretrained(folder, padding_side="left", clean_up_tokenization_spaces=False)
    except Exception as error:  # of the tokenizers library, which raises Exception itself
        raise ModelFolderError(f"{folder}: its tokenizer cannot be read: {error}") from error
    tokenizer.add_tokens([AddedToken(IMAGE, normalized=False, special=True)], special_tokens=True)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if image_token_id >= rows:
        raise ModelFolderError(f"{folder}: {IMAGE} would be token {image_token_id}, but the vocabulary has {rows} rows")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
