"""Hybrids through transformers' own front doors: Auto classes, save_pretrained, shards, dtypes; and the model card."""

import copy
import json
import subprocess
import sys

import pytest
import released_layouts as layouts
import tiny_models
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PhiConfig, PhiForCausalLM

import matvlm
from matvlm.init import convert_
from matvlm.models import hybrid, tinyllava

LAYERS = [0, 2]
AUTO = {"phi": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "llava": AutoModelForImageTextToText}


def converted(family: str, init: str = "aligned"):
    model = getattr(tiny_models, family)()
    convert_(model, LAYERS, init, seed=3)
    return model


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    return tiny_models.vlm_inputs(2, 5) if family == "llava" else {"input_ids": tiny_models.token_ids(2, 9)}


@pytest.fixture(params=AUTO)
def saved(request, tmp_path):
    model = converted(request.param)
    hybrid.save(model, None, tmp_path / "student", {"teacher": "org/name", "updates": 7})
    return request.param, model, tmp_path / "student"


@torch.no_grad()
def test_auto_classes_open_a_hybrid_as_the_class_it_was_trained_as(saved):
    family, model, folder = saved
    loaded = AUTO[family].from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    assert type(loaded) is type(matvlm.load(str(folder))[0])
    assert list(hybrid.mixers(loaded)) == LAYERS
    assert torch.equal(loaded(**inputs_of(family)).logits, model(**inputs_of(family)).logits)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        loaded.generate(**inputs_of(family), assistant_model=tiny_models.phi(), max_new_tokens=2)


def test_a_hybrid_is_still_an_instance_of_its_family():
    model = converted("phi")
    assert isinstance(model, PhiForCausalLM)
    assert isinstance(model.config, PhiConfig)
    assert model.config.model_type == "phi"
    assert type(model).__name__ == "PhiForCausalLM"
    assert type(model) is type(converted("phi", "random"))
    plain = tiny_models.phi()
    assert type(plain) is PhiForCausalLM
    assert type(plain.config) is PhiConfig


def test_auto_classes_are_strict(saved):
    family, _, folder = saved
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.self_attn.dt_bias"))
    tensors["stray"] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        hybrid.ModelFolderError, match=r"missing tensors .*layers.2.self_attn.dt_bias.*unexpected.*stray"
    ):
        AUTO[family].from_pretrained(folder)


def test_config_survives_copies_and_round_trips(saved):
    family, model, folder = saved
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config)
    assert config.model_type == family
    assert config.to_dict()["model_type"] == "matvlm"
    for again in (copy.deepcopy(config), type(config).from_dict(config.to_dict())):
        assert again.to_dict() == config.to_dict()
    fresh = AUTO[family].from_config(config)
    assert list(hybrid.mixers(fresh)) == LAYERS
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_plain_save_pretrained_loads_too(saved, tmp_path):
    _, model, _ = saved
    model.save_pretrained(tmp_path / "again")
    loaded, _ = hybrid.load(tmp_path / "again")
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_round_trip_keeps_the_dtype(tmp_path, dtype):
    model = converted("llava").to(dtype)
    hybrid.save(model, None, tmp_path / "model", {}, max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    expected = model.state_dict()
    for loaded in (
        hybrid.load(tmp_path / "model")[0],
        AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype="auto"),
    ):
        actual = loaded.state_dict()
        assert actual.keys() == expected.keys()
        assert all(actual[name].dtype == dtype and torch.equal(actual[name], expected[name]) for name in expected)
    missing = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(hybrid.ModelFolderError, match=missing.name):
        hybrid.load(tmp_path / "model")


def run_python(program: str, folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)


def test_importing_matvlm_is_enough_before_or_after_transformers(tmp_path):
    model = converted("phi")
    hybrid.save(model, None, tmp_path / "model", {})
    load = (
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[2].self_attn).__name__)"
    )
    for imports in ("import sys, matvlm\n", "import sys\nfrom transformers import AutoConfig\nimport matvlm\n"):
        done = run_python(imports + load, tmp_path / "model")
        assert done.stdout.strip() == "Mamba2Mixer", done.stderr
    done = run_python("import sys\n" + load, tmp_path / "model")  # without it: an error, not a model with random layers
    assert done.returncode != 0
    assert "model type `matvlm`" in done.stderr


@pytest.mark.parametrize("first", ["import matvlm", "from transformers import AutoConfig"])
def test_converted_tinyllava_opens_after_importing_matvlm_alone(tmp_path, first):
    for name, mamba in {"teacher": None, "student": layouts.mamba_json()}.items():
        weights = layouts.tensors(student=mamba is not None)
        tinyllava.convert(layouts.write_release(tmp_path / f"released-{name}", weights, mamba), tmp_path / name)
    program = f"import sys\n{first}\n" + (
        "import matvlm\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
        "assert 'matvlm.models.tinyllava' not in sys.modules, 'imported before it is needed'\n"
        "for name in ('student', 'teacher'):\n"
        "    folder = f'{sys.argv[1]}/{name}'\n"
        "    model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "    print(AutoConfig.from_pretrained(folder).model_type, type(model).__name__)\n"
        "    print(*(type(layer.self_attn).__name__ for layer in model.get_decoder().layers))\n"
        "    print(type(model) is type(matvlm.load(folder)[0]))\n"
        "    print(name, type(AutoProcessor.from_pretrained(folder)).__name__)\n"
    )
    done = run_python(program, tmp_path)
    model = "matvlm_tinyllava TinyLlavaForConditionalGeneration"
    layers = ["Mamba2Mixer" if layer in layouts.MAMBA_LAYERS else "PhiAttention" for layer in range(4)]
    assert done.stdout.splitlines() == [
        *(model, " ".join(layers), "True", "student LlavaProcessor"),
        *(model, " ".join(["PhiAttention"] * 4), "True", "teacher LlavaProcessor"),
    ], done.stderr


def test_model_card_says_what_the_model_is(saved):
    family, model, folder = saved
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---", 2)
    fields = yaml.safe_load(front)
    assert fields["base_model"] == "org/name"
    assert fields["pipeline_tag"] == ("image-text-to-text" if family == "llava" else "text-generation")
    for row in (
        "| layers that are Mamba-2 | 0, 2 |",
        "| initialisation | aligned |",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
        "| updates | 7 |",
        "| weights | float32 |",
    ):
        assert row in body
    assert "rotary True" in body
    assert json.loads((folder / "config.json").read_text())["matvlm"]["provenance"]["teacher"] == "org/name"
