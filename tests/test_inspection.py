"""``inspect``: what it says of a model that does not exist is what the real model turns out to be."""

import http.server
import re
import threading
from contextlib import contextmanager
from pathlib import Path

import easy_vqa
import pytest
import released_layouts as layouts
import torch
from huggingface_hub import constants
from transformers import DynamicCache, PhiConfig, PhiForCausalLM
from transformers.activations import ACT2FN

from matvlm import cli
from matvlm.config import Teacher
from matvlm.costs import cache_bytes, decode_cost, kv_bytes
from matvlm.init import convert_
from matvlm.inspection import describe, describe_model, skeleton
from matvlm.inspection.recipe import count_samples, saved_bytes_per_token
from matvlm.models import hybrid, locate
from matvlm.models.small import SmallVLM, build_model, build_tokenizer
from matvlm.recipes import load_recipe, parse_recipe

RECIPES = Path(__file__).parents[1] / "flows" / "recipes"
SHIPPED = sorted(set(RECIPES.glob("*.yaml")) - set(RECIPES.glob("teacher-*")))
SIZES = SmallVLM(vision_hidden=32, vision_layers=1, vision_mlp=32, hidden=32, layers=4, mlp=64)
LAYERS = [0, 2]


@pytest.fixture(scope="module")
def teacher():
    return build_model(SIZES, build_tokenizer(["what shape is in the image"]))


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """A teacher of which only the config is there."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher.config.architectures = [type(teacher).__name__]
    teacher.config.save_pretrained(folder)
    return folder


@pytest.fixture
def student(teacher):
    student = build_model(SIZES, build_tokenizer(["what shape is in the image"]))
    convert_(student, LAYERS, "aligned")
    return student


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def recipe(model, *overrides):
    return parse_recipe("name: test", overrides=[f"teacher.model={model}", f"hybrid.layers={LAYERS}", *overrides])


def row(text, name):
    """The numbers of the table row that starts with ``name``."""
    line = next(line for line in text.splitlines() if re.match(rf"\s*{name}\s\s", line))
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", line.replace(name, ""))]


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_parameters_are_those_of_the_real_models(folder, teacher, student):
    text = describe(recipe(folder))
    trained = count(hybrid.trained_parameters(student, train_connector=True).values())
    total, mixers = count(student.parameters()), [p for m in hybrid.mixers(student).values() for p in m.parameters()]
    assert row(text, "hybrid") == [total, trained, total - trained]
    assert row(text, "teacher") == [count(teacher.parameters())] * 2
    assert row(text, "Mamba-2 mixers") == [count(mixers), count(mixers), 0]
    assert row(text, "vision tower")[0] == count(teacher.get_encoder("image").parameters())
    parts = ("Mamba-2 mixers", "attention", "embeddings", "rest of the decoder", "output head", "vision tower")
    assert sum(row(text, part)[0] for part in (*parts, "connector and other")) == total
    assert "2 of 4 decoder layers become Mamba-2 (50.0%): 0, 2" in text


def test_without_the_connector_only_mixers_are_trained(folder):
    text = describe(recipe(folder, "distill.train_connector=false"))
    assert row(text, "hybrid")[1] == row(text, "Mamba-2 mixers")[0]
    assert row(text, "connector and other")[1] == 0


def test_decoding_state_is_that_of_the_real_hybrids_cache(folder, student):
    ghost = skeleton.build(Teacher(model=str(folder)))
    convert_(ghost, LAYERS, "aligned")
    for length in (1, 50):
        cache = DynamicCache(config=student.config.get_text_config(decoder=True))
        with torch.inference_mode():
            student.get_decoder()(torch.zeros(1, length, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert cache_bytes(cache) == decode_cost(ghost).cache(length)


def test_a_skeleton_has_the_recipes_dtype_and_no_memory(folder):
    ghost = skeleton.build(Teacher(model=str(folder), dtype="bfloat16"))
    assert {(p.dtype, p.device.type) for p in ghost.parameters()} == {(torch.bfloat16, "meta")}
    assert sum(kv_bytes(ghost)) == SIZES.layers * 2 * SIZES.hidden * 2


@pytest.mark.parametrize(("activation", "mixers"), [("gelu_pytorch_tanh", 0), ("gelu_new", 0), ("gelu_new", 4)])
def test_the_activation_estimate_is_near_what_autograd_keeps(activation, mixers):
    """Measured at 4 x 200 tokens, in bytes a token: 37,608, 86,760, 126,110; estimated 37,683, 86,835, 127,795."""
    model = build_model(SmallVLM(), build_tokenizer(["a"])).train().requires_grad_(False)
    for layer in model.get_decoder().layers:
        layer.mlp.activation_fn = ACT2FN[activation]
    model.config.text_config.hidden_act = activation
    if mixers:
        convert_(model, range(0, 2 * mixers, 2), "aligned")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(inputs_embeds=torch.randn(4, 200, 128, requires_grad=True), use_cache=False)
    measured = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights) / 800
    assert saved_bytes_per_token(model.config.text_config, mixers, 4) == pytest.approx(measured, rel=0.1)


def test_samples_and_turns_are_the_packages():
    data = recipe("any").data
    assert count_samples(data) == (4000, 38575)
    halves = [data.model_copy(update={"max_turns": 5, "max_samples": limit}) for limit in (None, 400)]
    (samples, turns), some = map(count_samples, halves)
    images = easy_vqa.get_train_questions()[2]
    assert samples == sum(-(-images.count(image) // 5) for image in set(images))
    assert turns == 38575
    assert some == (round(samples / 10), round(turns / 10))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "4,000 samples / 64 = 63 an epoch, 63 in all: 0 warm-up, 63 stable, 0 decay"),
        (["distill.epochs=3", "distill.schedule.decay_updates=9"], "63 an epoch, 189 in all: 0 warm-up, 180 stable, 9"),
        (["distill.max_updates=5"], "63 an epoch, 5 in all"),
        (["distill.schedule.warmup_updates=99"], "warning: warm-up and decay are longer than the run"),
        (["distill.schedule.shape=cosine"], "0 warm-up, 63 down a cosine"),
        (["distill.align.updates=50"], "first: 50, mixers alone on the teacher's hidden states, learning rate 0.001"),
        (
            ["distill.align.updates=50", "distill.max_updates=5"],
            "then end to end: 4,000 samples / 64 = 63 an epoch, 5 in",
        ),
        (
            ["distill.loss.layer={from: 1, to: 0.1, updates: 30}"],
            "weight of layer: 1 to 0.1 in 30 updates, then constant",
        ),
        (["data={source: llava, path: a.json}"], "unknown until data is prepared"),
        (["data={source: llava, path: a.json, max_samples: 640}"], "about 640 samples / 64 = 10 an epoch"),
        (["data={source: llava, path: a.json, max_samples: 640, max_turns: 3}"], "unknown until data is prepared"),
        (["data.max_samples=400"], "about 400 samples / 64 = 7 an epoch"),
        (["targets.top_k=16"], "66 B per answer token (top 16"),
        (
            ["targets.top_k=16", "targets.scheme=topk_sampled"],
            "98 B per answer token (top 16 and 16 draws from the rest",
        ),
        (["targets.positions=all"], "130 B per token (top 32 and one tail bucket), 2 shards; total unknown"),
        (["data={source: llava, path: a.json}"], "total unknown until data is prepared"),
    ],
)
def test_updates_and_targets(folder, overrides, expected):
    assert expected in describe(recipe(folder, *overrides))


def test_more_gpus_share_what_zero_shards(folder):
    def gradients(*overrides):
        half = ("teacher.dtype=bfloat16", "distill.autocast=bfloat16")
        text = describe(recipe(folder, "distill.engine=deepspeed", *half, *overrides))
        return re.search(r"gradients\s+about ([\d.]+)", text).group(1)

    alone = float(gradients())
    assert float(gradients("resources.gpu=4")) == pytest.approx(alone / 4, rel=0.01)
    assert float(gradients("resources.gpu=4", "distill.deepspeed.zero_stage=1")) == alone


def test_layers_that_are_yet_to_be_measured_are_counted(folder):
    text = describe(recipe(folder, "hybrid.layers=sensitivity", "hybrid.ratio=0.5"))
    assert "2 of 4 decoder layers become Mamba-2 (50.0%): those that init_hybrid measures to matter least" in text
    assert row(text, "hybrid") == row(describe(recipe(folder)), "hybrid")


def test_layers_that_cannot_be_replaced_are_an_error(folder):
    with pytest.raises(ValueError, match="all 4 layers"):
        describe(recipe(folder, "hybrid.layers=[0, 1, 2, 3]"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_described_offline(path, offline):
    text = describe(load_recipe(path))
    assert f"name: {path.stem}" in text
    assert "Updates\n" in text
    assert "Teacher targets\n" in text


def test_an_unreachable_teacher_is_one_line(offline):
    text = describe(recipe("nobody/unreachable"))
    (line,) = [line for line in text.splitlines() if "cannot read its config.json" in line]
    assert "nobody/unreachable" in line
    assert "HF_HUB_OFFLINE" in line
    assert "Parameters" not in text
    assert "63 an epoch" in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), ("{", "not valid JSON"), ("[]", "not a JSON object"), ('{"model_type": "x"}', "'x'")],
)
def test_a_teacher_folder_that_cannot_be_used(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(skeleton.Unreachable, match=rf"(?i){re.escape(str(tmp_path))}.*{complaint}"):
        skeleton.build(Teacher(model=str(tmp_path)))


@contextmanager
def hub(folder, monkeypatch):
    """A hub that has the JSON files in ``folder`` as ``somebody/vlm``; gives the list of what it was asked for."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            owner, _, file = self.path.rpartition("/")
            found = owner.startswith("/somebody/vlm/resolve/") and (folder / file).is_file()
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write((folder / file).read_bytes() if found else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield asked
        server.shutdown()


def test_a_hub_model_is_read_from_its_config_alone(folder, monkeypatch):
    with hub(folder, monkeypatch) as asked:
        ghost = skeleton.build(Teacher(model="somebody/vlm", revision="v2"))
        with pytest.raises(skeleton.Unreachable, match="404"):
            skeleton.build(Teacher(model="somebody/else"))
    assert asked[0] == "/somebody/vlm/resolve/v2/config.json"
    assert ghost.config.text_config.hidden_size == SIZES.hidden


def test_a_decode_step_moves_what_it_is_said_to(teacher, student):
    """By hand: 4 layers of hidden 32; a mixer's state is 4 heads x 8 x 8, and 3 inputs of its 96 channels, float32."""
    plain, mixed = decode_cost(teacher), decode_cost(student)
    decoder = sum(p.numel() for p in teacher.get_decoder().parameters()) - teacher.get_input_embeddings().weight.numel()
    assert plain.weights == 4 * (decoder + sum(p.numel() for p in teacher.lm_head.parameters()))
    assert (plain.per_token, plain.per_sequence) == (4 * 2 * 32 * 4, 0)
    assert (mixed.per_token, mixed.per_sequence) == (2 * 2 * 32 * 4, 2 * 4 * (4 * 8 * 8 + 3 * 96))
    assert plain.step(100, batch=3) == plain.weights + 3 * 101 * plain.per_token
    assert mixed.step(100) == mixed.weights + 101 * mixed.per_token + 2 * mixed.per_sequence


def test_the_papers_model_costs_what_is_known_of_it():
    """Phi-2's keys and values take 327,680 B a token in bfloat16, a Mamba-2 state of 32 x 80 x 80 float32 819 KB."""
    config = PhiConfig(vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32)
    with torch.device("meta"):
        model = PhiForCausalLM(config).bfloat16()
    cost = decode_cost(model)
    assert cost.per_token == 327_680
    assert cost.weights == pytest.approx(5.3e9, rel=0.01)
    convert_(model, range(0, 32, 4), "paper")
    cost = decode_cost(model)
    assert cost.per_token == 327_680 * 3 // 4
    assert cost.per_sequence == 8 * (32 * 80 * 80 * 4 + 3 * 2560 * 3 * 2)


def test_a_hybrid_folder_is_described_with_its_teacher(student, teacher, tmp_path):
    hybrid.save(student.bfloat16(), None, tmp_path / "student", {"teacher": "org/name", "updates": 12})
    (tmp_path / "student" / "model.safetensors").unlink()  # the config is enough
    text = describe_model(str(tmp_path / "student"), contexts=[64])
    assert "2 of 4 decoder layers are Mamba-2 (50.0%): 0, 2\n  start: aligned\n  teacher: org/name\n" in text
    assert "LlavaForConditionalGeneration (llava), bfloat16" in text
    assert row(text, "hybrid")[0] == count(student.parameters())
    assert row(text, "teacher") == [count(teacher.parameters())] * 2
    teacher_cost, cost = decode_cost(teacher.bfloat16()), decode_cost(student)
    teacher.float()
    assert f"{teacher_cost.step(64) / cost.step(64):.2f}\n" in text.split("ratio", 1)[1]


def test_a_plain_model_is_described_alone(folder, teacher):
    text = describe_model(str(folder))
    assert "4 decoder layers, all attention" in text
    assert row(text, "model")[0] == count(teacher.parameters())
    assert not re.search(r"^  (ratio|hybrid|teacher) ", text, re.MULTILINE)


@pytest.fixture
def released(tmp_path):
    """One of the paper's students as it was released, in float16."""
    weights = layouts.tensors(student=True)
    return layouts.write_release(tmp_path / "released", weights, layouts.mamba_json(), dtype=torch.float16)


def test_a_released_student_is_described_with_its_teacher(released):
    model, _ = locate.load(str(released), "meta")
    (released / "model.safetensors").unlink()  # the JSON files are enough
    text = describe_model(str(released), contexts=[64])
    assert "TinyLlavaForConditionalGeneration (matvlm_tinyllava), float16" in text
    assert "2 of 4 decoder layers are Mamba-2 (50.0%): 0, 2\n  start: paper\n" in text
    assert row(text, "hybrid")[0] == count(model.parameters())
    (released / "mamba_config.json").unlink()
    alone = describe_model(str(released), contexts=[64])
    assert "4 decoder layers, all attention" in alone
    assert row(text, "teacher")[0] == row(alone, "model")[0] != row(text, "hybrid")[0]


def test_a_recipe_with_a_released_teacher_is_described(released):
    (released / "mamba_config.json").unlink()
    text = describe(load_recipe(RECIPES / "matvlm-phi2-025.yaml", [f"teacher.model={released}"]))
    assert "1 of 4 decoder layers become Mamba-2 (25.0%): 0" in text
    assert row(text, "teacher")[0] == count(skeleton.build_uri(str(released)).parameters())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "config.json",
            '{"model_type": "tinyllava"}',
            "config.json: text_config.model_type is None, expected one of phi",
        ),
        ("mamba_config.json", "{", "cannot read its mamba_config.json: .*not valid JSON"),
        ("mamba_config.json", "{}", "mamba_config.json: n_layer is None, expected 4"),
    ],
)
def test_a_damaged_release_is_one_line(released, file, content, message):
    (released / file).write_text(content)
    with pytest.raises(skeleton.Unreachable, match=message):
        skeleton.build_uri(str(released))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "from-the-hub"])
@pytest.mark.parametrize("student", [True, False], ids=["student", "teacher"])
def test_a_released_hub_model_needs_no_weights(released, tmp_path, monkeypatch, cached, student):
    if not student:
        (released / "mamba_config.json").unlink()
    if cached:
        repository = tmp_path / "models--somebody--vlm"
        for folder in ("refs", "snapshots"):
            (repository / folder).mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        released.rename(repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with hub(released, monkeypatch) as asked:
        ghost = skeleton.build_uri("somebody/vlm")
    assert list(hybrid.mixers(ghost)) == ([0, 2] if student else [])
    assert asked == ([] if cached else [f"/somebody/vlm/resolve/main/{name}config.json" for name in ("", "mamba_")])


def test_the_command_tells_a_recipe_from_a_model(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    assert "4 decoder layers, all attention" in capsys.readouterr().out
    assert cli.main(["inspect", str(folder / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
