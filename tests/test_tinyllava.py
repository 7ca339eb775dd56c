"""The paper's released checkpoints: names, tensors, logits, prompts and pixels of random ones in the same layouts."""

import json
import re

import numpy as np
import pytest
import released_forward
import released_layouts as layouts
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import matvlm
from matvlm.artifacts import Checkpoint
from matvlm.models import hybrid, locate, tinyllava
from matvlm.models.folder import ModelFolderError, is_released
from matvlm.models.mixer import Mamba2Mixer
from matvlm.models.tinyllava.processor import build_processor
from matvlm.models.tinyllava.release import read_config, read_mixers

TOLERANCE = 2e-5
"""On logits of standard deviation 1.1, fp32 against fp64; measured: 1.7e-6 teacher, 4.5e-6 student, 5.1e-6 with GQA."""
KINDS = {
    "teacher": {},
    "student": {"student": True},
    "student_gqa_biases": {"student": True, "kv_heads": 2, "bias": True},
}
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def release(folder, kind="teacher", **options):
    """A random checkpoint of ``kind`` in ``folder`` and its tensors in fp32."""
    arguments = KINDS[kind]
    weights = layouts.tensors(**arguments)
    if arguments.get("student"):
        options["mamba"] = layouts.mamba_json(**{k: v for k, v in arguments.items() if k != "student"})
    return layouts.write_release(folder, weights, **options), weights


def photo(width=70, height=40):
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(name):
    """A released tensor's name in the converted model, None for those it has no use for."""
    for pattern, replacement in (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^vision_tower\._vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^connector\._connector\.0\.", "model.multi_modal_projector.linear_1."),
        (r"^connector\._connector\.2\.", "model.multi_modal_projector.linear_2."),
        (r"\.mamba\.conv1d\.", ".self_attn.conv_"),
        (r"\.mamba\.norm\.", ".self_attn.norm_"),
        (r"\.mamba\.", ".self_attn."),
    ):
        name = re.sub(pattern, replacement, name)
    return None if name.startswith("model.vision_tower.head.") else name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, 1), (torch.bfloat16, 3)], ids=["fp32", "bf16-sharded"])
def test_every_tensor_arrives(tmp_path, kind, dtype, shards):
    folder, weights = release(tmp_path, kind, dtype=dtype, shards=shards)
    model, _ = tinyllava.load(folder)
    state = model.state_dict()
    expected = {ours(name): tensor for name, tensor in weights.items() if ours(name)}
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor.to(dtype).view_as(state[name])), name
        assert state[name].dtype == dtype
    assert set(hybrid.mixers(model)) == (set() if kind == "teacher" else set(layouts.MAMBA_LAYERS))
    assert not model.training


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_plain_forward(tmp_path, kind):
    folder, weights = release(tmp_path, kind, shards=2)
    model, processor = tinyllava.load(folder)
    inputs = processor(text=PROMPT, images=photo(), return_tensors="pt")
    expected = released_forward.logits(
        {name: tensor.double() for name, tensor in weights.items()},
        inputs.input_ids[0],
        inputs.pixel_values[0].double(),
        student=kind != "teacher",
    )
    found = model(**inputs).logits[0].double()
    assert expected.std() > 0.5
    print(f"{kind}: largest difference {(found - expected).abs().max():.1e}, logits std {expected.std():.1f}")
    assert (found - expected).abs().max() < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_generation_follows_the_plain_forward(tmp_path, kind):
    folder, weights = release(tmp_path, kind)
    model, processor = tinyllava.load(folder)
    inputs = processor(text=[PROMPT, PROMPT.replace("this", "it, then")], images=[photo(), photo(30, 60)], padding=True)
    inputs = inputs.convert_to_tensors("pt")
    length = inputs.input_ids.shape[1]
    generated = model.generate(**inputs, min_new_tokens=6, max_new_tokens=6, do_sample=False)
    assert inputs.attention_mask[0].sum() < length  # the shorter prompt is padded on the left
    for row in range(2):
        real = generated[row][length - int(inputs.attention_mask[row].sum()) :]
        logits = released_forward.logits(weights, real, inputs.pixel_values[row], student=kind == "student")
        assert logits[-7:-1].argmax(-1).tolist() == real[-6:].tolist()


def test_generation_ends_where_the_tokenizer_says(tmp_path):
    folder, _ = release(tmp_path)
    raw = layouts.config_json()
    del raw["text_config"]["eos_token_id"]  # Phi's default is another one
    (folder / "config.json").write_text(json.dumps(raw))
    model, processor = tinyllava.load(folder)
    end = processor.tokenizer.convert_tokens_to_ids(layouts.END)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (end, end)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_converted_folders_load_bitwise_the_same(tmp_path, kind):
    folder, weights = release(tmp_path / "released", kind, dtype=torch.float16, shards=3)
    made = tinyllava.convert(folder, tmp_path / "converted", source="org/name")
    loaded, processor = tinyllava.load(folder)
    model, again = hybrid.load(tmp_path / "converted")
    assert isinstance(model, tinyllava.TinyLlavaForConditionalGeneration)
    assert model.dtype == torch.float16
    state, expected = model.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert torch.equal(state["lm_head.bias"], weights["language_model.lm_head.bias"].half())

    texts = [chat.apply_chat_template(QUESTION, add_generation_prompt=True) for chat in (processor, again)]
    assert texts == [PROMPT, PROMPT]
    inputs, other = (chat(text=PROMPT, images=photo(), return_tensors="pt") for chat in (processor, again))
    assert all(torch.equal(inputs[name], other[name]) for name in inputs)
    assert torch.equal(loaded.float()(**inputs).logits, model.float()(**inputs).logits)

    layers = [] if kind == "teacher" else list(layouts.MAMBA_LAYERS)
    assert (made.uri, made.layers) == (str(tmp_path / "converted"), layers)
    assert made.parameters == sum(tensor.numel() for tensor in expected.values())
    assert '"source": "org/name"' in (tmp_path / "converted" / "config.json").read_text()
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted")
    assert type(auto) is type(model) is type(loaded)
    assert all(torch.equal(auto.state_dict()[name], tensor.to(auto.dtype)) for name, tensor in state.items())
    with pytest.raises(ModelFolderError, match="model_type is 'matvlm"):
        tinyllava.load(tmp_path / "converted")


def test_dtype_can_be_asked_for(tmp_path):
    folder, weights = release(tmp_path, "student", dtype=torch.float16)
    model, _ = tinyllava.load(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.bias, weights["language_model.lm_head.bias"].half().float())


def test_a_head_may_be_tied_to_the_embeddings():
    text = {"model_type": "phi", "vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = tinyllava.TinyLlavaConfig(text_config={**text, "tie_word_embeddings": True}, vision_config={})
    with torch.device("meta"):
        tied = tinyllava.TinyLlavaForConditionalGeneration(config)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    assert tied.lm_head.bias.shape == (16,)


def test_parts_are_found_by_their_usual_names(tmp_path):
    model, _ = tinyllava.load(release(tmp_path)[0])
    assert len(model.get_decoder().layers) == layouts.TEXT["layers"]
    assert type(model.get_encoder("image")).__name__ == "SiglipVisionModel"
    assert hybrid.find_connector(model) is model.model.multi_modal_projector


def test_processor(tmp_path):
    model, processor = tinyllava.load(release(tmp_path)[0])
    text = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert text == PROMPT
    inputs = processor(text=text, images=photo(), return_tensors="pt")
    assert model.config.image_token_id == layouts.IMAGE_TOKEN
    assert (inputs.input_ids == layouts.IMAGE_TOKEN).sum() == layouts.IMAGE_TOKENS == model.config.image_seq_length
    before, after = PROMPT.split("<image>")
    around = inputs.input_ids[0][inputs.input_ids[0] != layouts.IMAGE_TOKEN].tolist()
    # the released code tokenises what is before and after the image by itself
    assert around == processor.tokenizer(before).input_ids + processor.tokenizer(after).input_ids
    squeezed = np.asarray(photo().resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = torch.from_numpy((squeezed - 0.5) / 0.5).permute(2, 0, 1)
    assert (inputs.pixel_values[0] - expected).abs().max() < 1e-6


def test_a_dialogue_is_written_as_in_training(tmp_path):
    _, processor = tinyllava.load(release(tmp_path)[0])
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Its colour?"},
    ]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert text == f"{PROMPT} A cat.{layouts.END}USER: Its colour? ASSISTANT:"
    assert processor.tokenizer(f"cat.{layouts.END}").input_ids[-1] == processor.tokenizer.eos_token_id


def test_sizes_of_the_real_model(tmp_path):
    raw = layouts.config_json()
    raw["text_config"] |= {"hidden_size": 2560, "num_attention_heads": 32, "num_key_value_heads": 32}
    raw["text_config"] |= {"num_hidden_layers": 32, "intermediate_size": 10240}
    del raw["text_config"]["vocab_size"]  # 51200 is transformers' default, so the real file does not have it
    raw["vision_config"] |= {"hidden_size": 1152, "image_size": 384, "num_attention_heads": 16}
    mamba = {"d_model": 2560, "ssm_cfg": {"expand": 1, "ngroups": 32, "d_state": 80}, "d_inner": 2560, "d_xb": 2560}
    mamba |= {"n_layer": 32, "attn_layers": [layer for layer in range(32) if layer % 4]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "mamba_config.json").write_text(json.dumps(mamba))
    layouts.write_tokenizer(tmp_path, filler=50256 - 256 - len(layouts.MERGES) + 36)  # phi-2 has 38 added tokens
    config = read_config(tmp_path)
    assert config.image_seq_length == 728
    assert config.text_config.vocab_size == 51200
    mixers = read_mixers(tmp_path, config)
    assert list(mixers) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert Mamba2Mixer(mixers[0], 0).in_proj.weight.shape == (4 * 2560 + 32, 2560)
    processor = build_processor(tmp_path, config)
    assert processor.image_token_id == 50295
    ids = processor(text=PROMPT, images=photo(), return_tensors="pt").input_ids
    assert (ids == 50295).sum() == 728


def test_is_released(tmp_path):
    folder, _ = release(tmp_path / "released")
    assert is_released(folder)
    tinyllava.convert(folder, tmp_path / "converted")
    assert not is_released(tmp_path / "converted")
    assert not is_released(tmp_path / "nothing")
    (folder / "config.json").write_text("{")
    assert not is_released(folder)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_matvlm_opens_and_describes_a_release(tmp_path, kind):
    folder, _ = release(tmp_path, kind, dtype=torch.float16)
    model, processor = matvlm.load(str(folder))
    expected, _ = tinyllava.load(folder, torch.float32)
    inputs = processor(text=PROMPT, images=photo(), return_tensors="pt")
    assert type(model) is type(expected)
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    layers = [] if kind == "teacher" else list(layouts.MAMBA_LAYERS)
    said = Checkpoint(uri=str(folder), label="x", init="paper" if layers else None, layers=layers)
    assert locate.describe(str(folder), "x") == said


def test_a_release_is_opened_from_the_hub_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--org--name"
    folder, _ = release(repository / "snapshots" / ("a" * 40), "student", shards=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path in folder.iterdir():
        assert any(path.match(pattern) for pattern in locate.HUB_FILES), f"{path.name} would stay on the hub"
    assert list(hybrid.mixers(matvlm.load("org/name")[0])) == list(layouts.MAMBA_LAYERS)


def spoil_tensors(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


BIAS = "language_model.lm_head.bias"
KERNEL = "language_model.model.layers.2.mamba.conv1d.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(BIAS), rf"missing tensors: {BIAS}$"),
        (lambda weights: weights.update(extra=torch.ones(1)), r"unknown tensors: extra \(model.safetensors\)$"),
        (
            lambda weights: weights.update({BIAS: torch.ones(3)}),
            rf"{BIAS} \(model.safetensors\) is \[3\], expected \[288\]$",
        ),
        (
            lambda weights: weights.update({KERNEL: weights[KERNEL][:, 0].contiguous()}),
            rf"{KERNEL} \(model.safetensors\) is \[120, 4\], expected \[120, 1, 4\]$",
        ),
        (
            lambda weights: weights.update({KERNEL.replace(".2.", ".1."): weights.pop(KERNEL)}),
            rf"missing tensors: {KERNEL}; unknown tensors: {KERNEL.replace('.2.', '.1.')}",
        ),
    ],
    ids=["missing", "unknown", "shape", "kernel", "other-layer"],
)
def test_odd_tensors_are_named(tmp_path, change, message):
    folder, _ = release(tmp_path, "student")
    spoil_tensors(folder, change)
    with pytest.raises(ModelFolderError, match=message):
        tinyllava.load(folder)


def test_a_student_without_its_mixers_is_refused(tmp_path):
    folder, _ = release(tmp_path, "student")
    (folder / "mamba_config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"unknown tensors: language_model.*layers\.0\.mamba\..* and \d+ more"):
        tinyllava.load(folder)


@pytest.mark.parametrize("damage", ["truncated", "absent", "index"])
def test_damaged_files_are_named(tmp_path, damage):
    folder, _ = release(tmp_path, shards=3)
    shard = folder / layouts.SHARD.format(2, 3)
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "absent":
        shard.unlink()
    else:
        (folder / "model.safetensors.index.json").write_text("[]")
    named = "index.json: damaged" if damage == "index" else re.escape(shard.name)
    with pytest.raises(ModelFolderError, match=named):
        tinyllava.load(folder)


def test_pickled_weights_stay_closed(tmp_path):
    folder, _ = release(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match=r"no \*\.safetensors"):
        tinyllava.load(folder)


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("config.json", "text_config.model_type", "qwen2", "text_config.model_type is 'qwen2', expected one of phi"),
        ("config.json", "vision_config.model_type", "clip_vision_model", "vision_config.model_type is 'clip"),
        ("config.json", "connector_type", "qformer", "connector_type is 'qformer'"),
        ("config.json", "image_aspect_ratio", "pad", "image_aspect_ratio is 'pad'"),
        ("config.json", "vision_feature_select_strategy", "cls", "vision_feature_select_strategy is 'cls'"),
        ("config.json", "vision_feature_layer", "last", "vision_feature_layer is 'last'"),
        ("config.json", "text_config.hidden_size", "wide", "not a usable config"),
        ("config.json", "text_config.vocab_size", 264, "<image> would be token 264, but the vocabulary has 264 rows"),
        ("mamba_config.json", "d_xb", 20, "d_xb is 20, expected 40"),
        ("mamba_config.json", "n_layer", 32, "n_layer is 32, expected 4"),
        ("mamba_config.json", "bidirectional", True, "bidirectional is True"),
        ("mamba_config.json", "attn_layers", [1, 4], r"attn_layers is \[1, 4\]"),
        ("mamba_config.json", "ssm_cfg.norm_before_gate", True, "ssm_cfg.norm_before_gate is True"),
        ("mamba_config.json", "ssm_cfg.d_state", 16, "ssm_cfg.d_state is 16, expected 10"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_settings_that_cannot_be_converted_are_named(tmp_path, file, field, value, message):
    folder, _ = release(tmp_path, "student")
    raw = json.loads((folder / file).read_text())
    section, _, name = field.rpartition(".")
    (raw[section] if section else raw)[name] = value
    (folder / file).write_text(json.dumps(raw))
    with pytest.raises(ModelFolderError, match=rf"{re.escape(file) if 'token' not in message else ''}.*{message}"):
        tinyllava.load(folder)


@pytest.mark.parametrize(("name", "content"), [("vocab.json", None), ("vocab.json", "{"), ("merges.txt", None)])
def test_a_tokenizer_that_is_missing_or_damaged_is_refused(tmp_path, name, content):
    folder, _ = release(tmp_path)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ModelFolderError, match="tokenizer"):
        tinyllava.load(folder)
