"""Choosing layers, swapping them, and model folders: bitwise round trips and refusals."""

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, PhiForCausalLM

from matvlm.init import convert_
from matvlm.models import hybrid, small
from matvlm.models.layers import choose_layers
from matvlm.storage import StorageError

LAYERS = [0, 2]
PROVENANCE = {"teacher": "tiny", "updates": 3}


@pytest.mark.parametrize(
    ("num_layers", "ratio", "rule", "expected"),
    [
        (32, 0.25, "even", [0, 4, 8, 12, 16, 20, 24, 28]),
        (32, 0.5, "even", list(range(0, 32, 2))),
        (32, 0.125, "even", [0, 8, 16, 24]),
        (32, 0.125, "paper", [0, 6, 12, 18]),
        (32, 0.25, "paper", [0, 4, 8, 12, 16, 20, 24, 28]),
        (32, 0.5, "paper", list(range(0, 32, 2))),
        (8, 0.25, "even", [0, 4]),
        (10, 0.3, "even", [0, 3, 6]),
        (8, 0.75, "even", [0, 1, 2, 4, 5, 6]),
        (8, 0.25, "first", [0, 1]),
        (8, 0.25, "middle", [3, 4]),
        (8, 0.25, "last", [6, 7]),
        (8, 0.9, [5, 1], [1, 5]),
    ],
)
def test_layers_of_each_rule(num_layers, ratio, rule, expected):
    assert choose_layers(num_layers, ratio, rule) == expected


@pytest.mark.parametrize(
    ("ratio", "rule", "message"),
    [
        (0.99, "even", "ratio 0.99 replaces all 4 layers: at least one has to stay attention"),
        (0.1, "first", "ratio 0.1 replaces none of the 4 layers"),
        (0.5, "odd", "rule 'odd' is not one of even, paper, first, middle, last"),
        (0.5, [0, 4], r"layers \[4\] do not exist: the model has layers 0 to 3"),
        (0.5, [-1], r"layers \[-1\] do not exist"),
        (0.5, [1, 1], r"layers \[1, 1\] names a layer twice"),
        (0.5, [3, 2, 1, 0], r"layers \[3, 2, 1, 0\] replaces all 4 layers"),
        (0.5, [], r"layers \[\] replaces none"),
    ],
)
def test_impossible_layers_are_refused(ratio, rule, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(4, ratio, rule)


def test_conversion_swaps_only_the_chosen_layers_and_returns_the_originals():
    model = tiny_models.phi()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attentions = [layer.self_attn for layer in model.model.layers]
    originals = convert_(model, LAYERS, "paper")
    assert {index: id(module) for index, module in originals.items()} == {i: id(attentions[i]) for i in LAYERS}
    assert list(hybrid.mixers(model)) == LAYERS
    after = model.state_dict()
    for name, value in before.items():
        replaced = name.startswith(tuple(f"model.layers.{i}.self_attn." for i in LAYERS))
        assert (name in after) != replaced
        kept = originals[int(name.split(".")[2])].state_dict()[name.split("self_attn.")[1]] if replaced else after[name]
        assert torch.equal(kept, value)


def test_a_hybrid_class_is_made_once():
    made = hybrid.hybrid_class(PhiForCausalLM)
    assert issubclass(made, PhiForCausalLM)
    assert hybrid.hybrid_class(PhiForCausalLM) is made
    assert hybrid.hybrid_class(made) is made


def test_converting_twice_or_all_layers_is_refused():
    model = tiny_models.phi()
    with pytest.raises(ValueError, match=r"cannot replace layers \[0, 1, 2, 3\] of 4"):
        convert_(model, range(4), "paper")
    assert not hybrid.mixers(model)
    convert_(model, [1], "paper")
    with pytest.raises(ValueError, match=r"layers \[1\] are Mamba-2 already"):
        convert_(model, [0], "paper")


@pytest.mark.parametrize("train_connector", [True, False])
def test_only_mixers_and_connector_train(train_connector):
    model = tiny_models.llava()
    convert_(model, LAYERS, "aligned")
    trained = hybrid.trained_parameters(model, train_connector)
    connector = {name for name, _ in model.named_parameters() if ".multi_modal_projector." in name}
    mixer = {name for name, _ in model.named_parameters() if any(f"layers.{i}.self_attn." in name for i in LAYERS)}
    assert len(connector) == 4
    assert set(trained) == mixer - {n for n in mixer if "vision_tower" in n} | (connector if train_connector else set())
    assert all(parameter.requires_grad == (name in trained) for name, parameter in model.named_parameters())
    assert all(trained[name] is model.get_parameter(name) for name in trained)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no Mamba-2 layers"):
        hybrid.trained_parameters(tiny_models.phi(), train_connector=False)
    model = tiny_models.phi()
    convert_(model, LAYERS, "aligned")
    with pytest.raises(ValueError, match="PhiForCausalLM has no connector"):
        hybrid.trained_parameters(model, train_connector=True)


def same_weights(actual, expected) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("init", ["aligned", "paper", None])
@pytest.mark.parametrize("family", ["phi", "llama", "llava"])
@torch.no_grad()
def test_round_trip_is_bitwise(tmp_path, family, init):
    model = getattr(tiny_models, family)()
    if init:
        convert_(model, LAYERS, init, seed=3, chunk_size=16)
    hybrid.save(model, None, tmp_path / "model", PROVENANCE)
    loaded, processor = hybrid.load(tmp_path / "model")
    assert processor is None
    assert type(loaded) is type(model)
    assert not loaded.training
    same_weights(loaded, model)
    inputs = tiny_models.vlm_inputs(2, 5) if family == "llava" else {"input_ids": tiny_models.token_ids(2, 9)}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded._is_stateful == bool(init)
    options = {i: mixer.options for i, mixer in hybrid.mixers(model).items()}
    assert {i: mixer.options for i, mixer in hybrid.mixers(loaded).items()} == options
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    if init:
        assert config["matvlm"]["layers"] == LAYERS
        assert config["matvlm"]["init"] == init
        assert config["matvlm"]["provenance"] == PROVENANCE
    else:
        assert "matvlm" not in config
        assert config["matvlm_provenance"] == PROVENANCE


def test_tied_weights_stay_tied(tmp_path):
    model = tiny_models.llama()
    convert_(model, LAYERS, "paper")
    hybrid.save(model, None, tmp_path / "model", {})
    loaded, _ = hybrid.load(tmp_path / "model")
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_second_save_of_a_loaded_model_is_the_same(tmp_path):
    model = tiny_models.llava()
    convert_(model, LAYERS, "aligned")
    hybrid.save(model, None, tmp_path / "a", PROVENANCE)
    hybrid.save(hybrid.load(tmp_path / "a")[0], None, tmp_path / "b", PROVENANCE)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first["matvlm"] == second["matvlm"]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_dtype_on_load(tmp_path):
    model = tiny_models.phi().bfloat16()
    convert_(model, LAYERS, "aligned")
    hybrid.save(model, None, tmp_path / "model", {})
    assert {p.dtype for p in hybrid.load(tmp_path / "model")[0].parameters()} == {torch.bfloat16}
    assert {p.dtype for p in hybrid.load(tmp_path / "model", torch.float32)[0].parameters()} == {torch.float32}


def test_processor_travels_with_the_model(tmp_path):
    tokenizer = small.build_tokenizer(["is there a red circle?", "yes"])
    sizes = small.SmallVLM(image_size=16, vision_hidden=16, vision_layers=1, vision_mlp=16, hidden=32, layers=2, mlp=32)
    model, processor = small.build_model(sizes, tokenizer), small.build_processor(sizes, tokenizer)
    convert_(model, [0], "aligned")
    hybrid.save(model, processor, tmp_path / "model", {})
    loaded, again = hybrid.load(tmp_path / "model")
    image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
    expected = processor(images=image, text="USER: <image>\nis there a red circle? ASSISTANT:", return_tensors="pt")
    actual = again(images=image, text="USER: <image>\nis there a red circle? ASSISTANT:", return_tensors="pt")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id

    hybrid.save(tiny_models.phi(), tokenizer, tmp_path / "text", {})
    assert hybrid.load(tmp_path / "text")[1].get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def folder(tmp_path):
    model = tiny_models.phi()
    convert_(model, LAYERS, "paper")
    hybrid.save(model, None, tmp_path / "model", {})
    return tmp_path / "model"


def refused(folder, message: str) -> None:
    with pytest.raises(hybrid.ModelFolderError, match=message) as caught:
        hybrid.load(folder)
    assert str(folder) in str(caught.value)


def rewrite_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_missing_unexpected_and_misshapen_tensors_are_named(folder):
    name = "model.layers.1.mlp.fc1.weight"
    original = load_file(folder / "model.safetensors")[name]
    rewrite_tensors(folder, lambda tensors: tensors.pop(name))
    refused(folder, f"missing tensors .*{name}")
    rewrite_tensors(folder, lambda tensors: tensors.update({name: original, "stray.weight": torch.zeros(2)}))
    refused(folder, "unexpected tensors .*stray.weight")
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(3, 3)}) or tensors.pop("stray.weight"))
    refused(folder, f"wrongly shaped tensors .*{name}")


def test_config_that_does_not_match_the_tensors(folder):
    def move(config):
        section = config["matvlm"]
        section["layers"] = [0, 3]
        section["mixers"] = {"0": section["mixers"]["0"], "3": section["mixers"]["2"]}

    rewrite_config(folder, move)
    refused(folder, r"matvlm.layers is \[0, 3\], but the tensors hold mixers for the layers \[0, 2\]")
    rewrite_config(folder, lambda config: config["matvlm"].pop("model_type"))
    refused(folder, r"config.json: matvlm.model_type is None, which transformers does not know")
    rewrite_config(folder, lambda config: config.pop("matvlm") and config.update(model_type="phi"))
    refused(folder, r"A_log")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda section: section.update(format=1), "matvlm.format is 1, expected 2"),
        (lambda section: section.update(layers=[0]), "layers and mixers must name the same layers"),
        (lambda section: section["mixers"]["2"].update(speed=1), r"mixers.2: missing or unknown options \['speed'\]"),
        (lambda section: section["mixers"]["2"].pop("rotary"), r"mixers.2: missing or unknown options \['rotary'\]"),
        (lambda section: section["mixers"]["0"].update(num_heads=2), "wrongly shaped tensors"),
    ],
)
def test_broken_section_is_refused(folder, change, message):
    rewrite_config(folder, lambda config: change(config["matvlm"]))
    refused(folder, message)


def test_folders_that_are_no_model(folder, tmp_path):
    refused(tmp_path / "nowhere", "no config.json there")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])
    refused(folder, "model.safetensors: damaged")
    (folder / "model.safetensors").unlink()
    rewrite_config(folder, lambda config: config.pop("matvlm") and config.update(model_type="phi"))
    refused(folder, "cannot load the weights")
    rewrite_config(folder, lambda config: config.update(architectures=["NoSuchModel"]))
    refused(folder, "architectures: NoSuchModel is no model class of transformers")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")


def test_pickled_weights_are_not_read(tmp_path):
    model = tiny_models.phi()
    hybrid.save(model, None, tmp_path / "model", {})
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    refused(tmp_path / "model", "cannot load the weights")


def test_failed_save_leaves_the_old_folder(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    class FailingProcessor:
        def save_pretrained(self, path):
            raise StorageError("disk full")

    model, _ = hybrid.load(folder)
    with pytest.raises(StorageError):
        hybrid.save(model, FailingProcessor(), folder, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_connector_and_decoder_are_found():
    assert hybrid.find_connector(tiny_models.phi()) is None
    model = tiny_models.llava()
    assert isinstance(model, LlavaForConditionalGeneration)
    assert hybrid.find_connector(model) is model.model.multi_modal_projector
    assert hybrid.decoder_layers(model) is model.model.language_model.layers
    text = tiny_models.phi()
    assert isinstance(text, PhiForCausalLM)
    assert hybrid.decoder_layers(text) is text.model.layers
