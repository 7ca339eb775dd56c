"""Every family, every way to generate; what is refused, and what is said when a family cannot be followed exactly."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
import transformers
from family_table import TOLERANCE, WAYS, Case, attempt, compiled, hybrid_case, largest, teacher_case
from packaging.version import Version
from tiny_families import FAMILIES, TEXT, WINDOW
from torch import nn

from matvlm.init import convert_
from matvlm.models import families
from matvlm.models.hybrid import decoder_layers, mixers
from matvlm.models.mixer import rotate

OLD = Version(transformers.__version__) < Version("5.23")  # its chunked prefill hands no chunk its image
SPLIT_IMAGES = {"paligemma", "gemma3"}
"""Their images look both ways, which a chunk of an image cannot."""
COMPILED = ("phi", "gemma2", "qwen2_vl")


def teacher_cannot(name: str, way: str) -> bool:
    return way == "chunked prefill" and (name in SPLIT_IMAGES or (OLD and FAMILIES[name].images is not None))


@pytest.fixture(scope="module", params=FAMILIES)
def named_case(request: pytest.FixtureRequest) -> tuple[str, Case]:
    return request.param, hybrid_case(request.param)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "compile"])
def test_every_way_gives_the_logits_of_a_recompute(named_case, way):
    name, case = named_case
    works, said = attempt(WAYS[way], case)
    if teacher_cannot(name, way):
        assert not attempt(WAYS[way], teacher_case(name))[0], "the teacher can: so should the hybrid"
    else:
        assert works, said


def test_every_layer_counts(named_case):
    """Else a mistake in one would not show in the logits. Without a layer's mixer or attention: 1.6 or more."""
    _, case = named_case
    (prompt,) = case.prompts(9)
    with torch.no_grad():
        expected = case.model(**prompt).logits
        for layer in decoder_layers(case.model):
            hook = layer.self_attn.register_forward_hook(lambda _module, _args, output: (output[0] * 0, None))
            assert largest(case.model(**prompt).logits, expected) > 0.1
            hook.remove()


@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_decoding_compiles_to_one_graph(name):
    assert compiled(hybrid_case(name)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phi", "gemma2"])
def test_decoding_compiles_with_inductor(name):
    assert compiled(hybrid_case(name), "inductor") < TOLERANCE


@pytest.mark.parametrize("layers", [(0, 2), (1, 3), (1, 2, 3)], ids=["sliding", "full", "all-but-one"])
@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_any_mix_of_sliding_and_full_layers(monkeypatch, name, layers):
    """gemma2 slides in the layers 0 and 2, mistral in all: with none of a kind left, masks come from the other kind."""
    monkeypatch.setitem(FAMILIES, name, dataclasses.replace(FAMILIES[name], layers=layers))
    case = hybrid_case(name)
    for way in ("left padding", "chunked prefill", "beam search"):
        works, said = attempt(WAYS[way], case)
        assert works, (way, said)


@pytest.mark.parametrize("name", ["phi", "gemma2"])
def test_padding_in_chunks_of_one_token(name):
    case = hybrid_case(name)
    for cache in ("dynamic", "static"):
        assert case.difference(case.prompts(3, 8), prefill_chunk_size=1, cache_implementation=cache) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "internvl", "paligemma"])
def test_eager_and_sdpa_masks_are_read_alike(name):
    case = hybrid_case(name)
    for attention in ("eager", "sdpa"):
        if attention == "sdpa" and name == "gemma2":
            continue  # has no sdpa
        case.model.set_attn_implementation(attention)
        assert WAYS["left padding"](case) < TOLERANCE


def test_every_parameter_of_a_mixer_learns(named_case):
    _, case = named_case
    (prompt,) = case.prompts(9)
    case.model.zero_grad()
    case.model(**prompt, use_cache=False).logits.logsumexp(-1).sum().backward()
    for index, mixer in mixers(case.model).items():
        for name, parameter in mixer.named_parameters():
            assert parameter.grad.abs().max() > 0, (index, name)


def converted(name: str, init: str = "aligned", layers: tuple[int, ...] = (0, 1)) -> tuple[dict, list[str]]:
    model = FAMILIES[name].build()
    convert_(model, layers, init)
    return {index: mixer.options for index, mixer in mixers(model).items()}, model.config.matvlm["caveats"]


def test_layers_without_rotary_embedding_are_not_rotated():
    options, _ = converted("smollm3")
    assert (options[0].rotary, options[1].rotary) == (True, False)


def test_norms_of_the_heads_go_along_with_aligned():
    options, caveats = converted("qwen3")
    assert options[0].qk_norm_eps == 1e-6
    assert caveats == []
    options, caveats = converted("qwen3", "paper")
    assert options[0].qk_norm_eps is None
    assert caveats == ["the attention of the layers [0, 1] had q_norm, k_norm, which init paper drops"]
    assert converted("olmo2")[1] == ["the attention of the layers [0, 1] had k_norm, q_norm, which init aligned drops"]


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "mistral", "gemma2", "qwen2_vl", "llama"])
def test_what_cannot_be_followed_is_said_once(name, caplog):
    with caplog.at_level(logging.WARNING, "matvlm"):
        _, caveats = converted(name)
    ours = [record.getMessage() for record in caplog.records if record.name == "matvlm.init"]
    assert ours == [f"{FAMILIES[name].model_class}: {caveat}" for caveat in caveats]
    window = f"saw the last {WINDOW} tokens only; as Mamba-2 they have a fading memory without that limit"
    expected = {
        "gemma3": ["gemma3: an image's tokens attend to each other in both directions; the Mamba-2 layers [0, 1] read "
                   "from left to right only", f"the layers [0] {window}"],
        "paligemma": ["paligemma: the image and the prompt attend to each other in both directions; the Mamba-2 layers "
                      "[0, 1] read from left to right only"],
        "mistral": [f"the layers [0, 1] {window}"],
        "gemma2": [f"the layers [0] {window}"],
        "qwen2_vl": ["positions in an image have height and width (mrope); init aligned rotates by all of them, but "
                     "the Mamba-2 layers' memory fades by the order of the tokens"],
        "llama": [],
    }  # fmt: skip
    assert caveats == expected[name]


def test_a_window_as_long_as_any_input_is_no_caveat():
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=256))
    assert families.caveats(model, convert_(model, [0], "aligned"), "aligned") == []


def build(name: str, **values: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**TEXT, **values})
    with torch.device("meta"):
        for suffix in ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel"):
            if hasattr(transformers, name + suffix):
                return getattr(transformers, name + suffix)(config)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("T5", {"num_layers": 2}, "T5ForConditionalGeneration: an encoder-decoder model"),
        ("GPT2", {"n_layer": 2, "n_embd": 32, "n_head": 4}, "decoder GPT2Model has no list of layers named 'layers'"),
        ("GPTNeoX", {}, "GPTNeoXForCausalLM: layer 0 has no self_attn, only input_layernorm"),
        ("Qwen3Next", {"num_experts": 2}, "Qwen3NextForCausalLM: layer 0 has no self_attn, only linear_attn"),
        ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 4}, "FalconH1ForCausalLM: layers of the kinds hybrid"),
        ("Gemma3", {"use_bidirectional_attention": True}, "Gemma3ForCausalLM: its tokens attend in both directions"),
        ("Afmoe", {}, "AfmoeAttention: a mixer has no place for its gate_proj"),
        ("DeepseekV3", {"n_routed_experts": 4}, "DeepseekV3Attention: unknown attention; expected head_dim, q_proj"),
        ("GptOss", {"num_local_experts": 2, "head_dim": 8}, "GptOssAttention: a mixer has no place for its sinks"),
        ("Glm", {"head_dim": 8}, "GlmAttention: init aligned does not know its rotary embedding: use init paper"),
        ("Cohere", {}, "CohereAttention: init aligned does not know its rotary embedding: use init paper"),
    ],
)
def test_refusals_name_class_and_reason(name, values, complaint):
    if name == "Gemma3":
        config = transformers.Gemma3TextConfig(**{**TEXT, **values})
        model = transformers.Gemma3ForCausalLM(config)
    else:
        model = build(name, **values)
        if name in ("Glm", "Cohere"):  # how they rotate is seen by trying
            model = model.to_empty(device="cpu")
    with pytest.raises(ValueError, match=re.escape(complaint)):
        convert_(model, [0], "aligned")


def test_a_rotary_embedding_is_known_by_what_it_does():
    """glm4v has the usual function for its vision tower and another one for its decoder, in one module."""
    text = {**TEXT, "head_dim": 8, "model_type": "glm4v_text"}
    config = transformers.Glm4vTextConfig(**text)
    attention = transformers.models.glm4v.modeling_glm4v.Glm4vTextAttention(config, 0)
    with pytest.raises(ValueError, match="Glm4vTextAttention: init aligned does not know its rotary embedding"):
        families.rotates_halves(attention)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_an_image_turn_heads_as_in_the_family(name):
    """mrope: positions [3, B, L] of time, height and width; the family's rotary module merges them."""
    decoder = FAMILIES[name].build().get_decoder()
    module = __import__(type(decoder).__module__, fromlist=["apply_rotary_pos_emb"])
    heads = torch.randn(2, 6, 4, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.randint(0, 9, (3, 2, 6), generator=torch.Generator().manual_seed(1))
    cos, sin = decoder.rotary_emb(heads, positions)
    turned, _ = module.apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(rotate(heads, cos, sin), turned, rtol=0, atol=1e-6)
    flat, _ = decoder.rotary_emb(heads, positions[:1].expand(3, -1, -1))
    assert not torch.allclose(flat, cos)  # height and width count
    with pytest.raises(ValueError, match=r"position_embeddings of shape \[3, 2, 6, 8\], expected"):
        rotate(heads, cos[None].expand(3, -1, -1, -1), sin[None].expand(3, -1, -1, -1))
