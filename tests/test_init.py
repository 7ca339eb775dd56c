"""Every mixer tensor traced to the attention tensor it comes from, and what the starts are worth."""

import math

import pytest
import tiny_families
import tiny_models
import torch
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from matvlm import init
from matvlm.init import INITS, convert_, in_proj_rows, read_attention
from matvlm.models.hybrid import mixers

FAMILIES = {"phi": tiny_models.phi, "llama": tiny_models.llama}
family_of = pytest.mark.parametrize("family", FAMILIES)


def attention_of(family: str, layer: int = 2) -> nn.Module:
    return FAMILIES[family]().model.layers[layer].self_attn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(mixer: nn.Module) -> dict[str, Tensor | None]:
    """Every parameter of ``mixer``, in_proj cut into its outputs."""
    named = {name: value.detach() for name, value in mixer.named_parameters()}
    weight, bias = named.pop("in_proj.weight"), named.pop("in_proj.bias", None)
    for part, rows in in_proj_rows(mixer).items():
        named[f"{part}.weight"] = weight[rows]
        named[f"{part}.bias"] = None if bias is None else bias[rows]
    return named


def copied_from(attention: nn.Module) -> dict[str, Tensor | None]:
    """What has to be in a mixer's parts that come from the attention, by the mixer's names."""
    out = getattr(attention, "dense", None) or attention.o_proj
    sources = {"x": attention.v_proj, "B": attention.k_proj, "C": attention.q_proj, "out_proj": out}
    return {f"{to}.{kind}": getattr(source, kind) for to, source in sources.items() for kind in ("weight", "bias")}


@family_of
def test_paper_copies_the_attention_and_draws_the_rest(family):
    attention = attention_of(family)
    mixer, drawn = parts(init.paper(attention, 2, generator())), parts(init.random(attention, 2, generator()))
    expected = copied_from(attention)
    assert mixer.keys() == drawn.keys()
    for name, value in mixer.items():
        source = expected[name] if name in expected else drawn[name]
        assert (value is None) == (source is None), name
        assert value is None or torch.equal(value, source), name
    assert sum(value is not None for name, value in expected.items()) == {"phi": 8, "llama": 4}[family]


@family_of
def test_aligned_copies_the_attention_and_draws_nothing(family):
    attention = attention_of(family)
    mixer, other_seed = parts(init.aligned(attention, 2, generator(0))), parts(init.aligned(attention, 2, generator(1)))
    expected = copied_from(attention)
    for name in ("x.bias", "B.bias", "C.bias"):  # aligned needs a bias for z, so a bias there has to be
        if expected[name] is None:
            expected[name] = torch.zeros_like(mixer[name])
    expected = {name: value for name, value in expected.items() if value is not None}
    identity = torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(mixer["conv_weight"])
    zeros = {
        name: torch.zeros_like(mixer[name]) for name in ("z.weight", "dt.weight", "dt.bias", "conv_bias", "A_log", "D")
    }
    ones = {"norm_weight": torch.ones(32), "z.bias": torch.full((32,), 1.2784645)}
    expected |= zeros | ones | {"conv_weight": identity}
    assert mixer.keys() - expected.keys() == {"dt_bias"}
    for name, value in expected.items():
        assert torch.equal(mixer[name], value), name
    assert all(torch.equal(mixer[name], other_seed[name]) for name in mixer)
    horizons = 1 / nn.functional.softplus(mixer["dt_bias"])
    torch.testing.assert_close(horizons, torch.tensor([4.0, 16.0, 64.0, 256.0]), rtol=1e-4, atol=0)
    assert nn.functional.silu(mixer["z.bias"][0]).item() == pytest.approx(1.0, abs=1e-6)


@torch.no_grad()
def seen_by(model: nn.Module, layer: int) -> dict:
    """What attention number ``layer`` is called with: normed hidden states, and the positions of its kind."""
    seen: dict = {}
    attention = model.model.layers[layer].self_attn
    hook = attention.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(tiny_models.token_ids(2, 19), use_cache=False)
    hook.remove()
    return {name: seen[name] for name in ("hidden_states", "position_embeddings")}


@pytest.mark.parametrize(
    ("family", "layer"),
    [("phi", 2), ("llama", 2), ("qwen3", 2), ("gemma3_text", 2), ("gemma3_text", 3), ("smollm3", 1)],
)
@torch.no_grad()
def test_aligned_is_rotary_linear_attention_with_a_fading_memory(family, layer):
    """The formula in the docstring, from the attention's own weights, norms and its family's own rotary embedding.

    Both kinds of gemma3's layers, which rotate differently, and one of smollm3's that do not rotate.
    """
    model = FAMILIES[family]() if family in FAMILIES else tiny_families.FAMILIES[family].build()
    attention = model.model.layers[layer].self_attn
    inputs = seen_by(model, layer)
    hidden, (cos, sin) = inputs["hidden_states"], inputs["position_embeddings"]
    module = __import__(type(attention).__module__, fromlist=["apply_rotary_pos_emb"])

    def heads(projection: nn.Module) -> Tensor:
        return projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q, k, v = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    if family in ("qwen3", "gemma3_text"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    if family != "smollm3":
        size = cos.shape[-1]
        q_turned, k_turned = module.apply_rotary_pos_emb(q[..., :size], k[..., :size], cos, sin)
        q, k = torch.cat([q_turned, q[..., size:]], -1), torch.cat([k_turned, k[..., size:]], -1)
    k, v = (module.repeat_kv(t, 4 // t.shape[1]) for t in (k, v))
    age = (torch.arange(19)[:, None] - torch.arange(19)).float()
    horizon = torch.tensor([4.0, 16.0, 64.0, 256.0])[:, None, None]
    fading = torch.where(age >= 0, torch.exp(-age / horizon), 0.0)
    y = (q @ k.mT * fading) @ v
    y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    out = getattr(attention, "dense", None) or attention.o_proj
    expected = out(y.transpose(1, 2).flatten(2))
    actual, _ = init.aligned(attention, layer, generator())(**inputs)
    # Measured up to 1.5e-6, outputs up to 8. Without rotary or norms, or heads repeated in the wrong order: above 1.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_norms_of_the_heads_are_copied_as_they_multiply():
    """gemma keeps its norms' weights minus one."""
    for family, offset in (("qwen3", 0.0), ("gemma3_text", 1.0)):
        attention = tiny_families.FAMILIES[family].build().model.layers[1].self_attn
        mixer = init.aligned(attention, 1, generator())
        torch.testing.assert_close(mixer.B_norm_weight.data, attention.k_norm.weight.data + offset, rtol=0, atol=1e-6)
        torch.testing.assert_close(mixer.C_norm_weight.data, attention.q_norm.weight.data + offset, rtol=0, atol=1e-6)
        assert not torch.allclose(mixer.B_norm_weight, mixer.C_norm_weight)
        for plain in (init.paper, init.random):
            assert plain(attention, 1, generator()).B_norm_weight is None


def test_random_start_is_mamba2s_own():
    mixer = init.random(attention_of("phi"), 0, generator())
    steps = nn.functional.softplus(mixer.dt_bias)
    assert ((steps >= 0.99e-3) & (steps <= 0.101)).all()
    assert ((mixer.A_log.exp() >= 1) & (mixer.A_log.exp() <= 16)).all()
    assert (mixer.D == 1).all()
    assert (mixer.norm_weight == 1).all()
    for weights, fan_in in ((mixer.in_proj.weight, 32), (mixer.conv_weight, 4), (mixer.out_proj.weight, 32)):
        assert weights.abs().max() <= fan_in**-0.5
        assert weights.std().item() == pytest.approx(fan_in**-0.5 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("name", INITS)
def test_attention_is_left_alone_and_nothing_is_shared(name):
    attention = attention_of("phi")
    before = {key: value.clone() for key, value in attention.state_dict().items()}
    mixer = INITS[name](attention, 2, generator())
    with torch.no_grad():
        for parameter in mixer.parameters():
            assert parameter.requires_grad
            parameter.fill_(7.0)
    assert all(torch.equal(attention.state_dict()[key], value) for key, value in before.items())


def test_draws_depend_on_seed_and_layer_only():
    def converted(layers: list[int], seed: int) -> dict[int, dict]:
        model = tiny_models.phi()
        torch.seed()  # whatever the global generator holds
        convert_(model, layers, "random", seed)
        return {index: mixer.state_dict() for index, mixer in mixers(model).items()}

    def same(a: dict, b: dict) -> bool:
        return all(torch.equal(a[key], b[key]) for key in a)

    one, two, other = converted([2], 5), converted([0, 2], 5), converted([2], 6)
    assert same(one[2], two[2])
    assert not same(two[0], two[2])
    assert not same(one[2], other[2])


def test_converting_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model_state = torch.get_rng_state()
    model = tiny_models.phi()
    torch.set_rng_state(model_state)
    convert_(model, [0], "paper")
    assert torch.equal(torch.rand(1), expected)


def test_dtype_and_mode_follow_the_model():
    model = tiny_models.phi().to(torch.bfloat16).train()
    convert_(model, [0], "aligned", chunk_size=32, kernels="torch")
    mixer = mixers(model)[0]
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.bfloat16}
    assert mixer.training
    assert mixer.options.chunk_size == 32
    assert mixer.kernels == "torch"


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("family", ["phi", "qwen3", "smollm3"])
def test_works_without_weights(family, name):
    real = tiny_families.FAMILIES[family].build()
    with torch.device("meta"):
        model = type(real)(real.config)
    for converted in (real, model):
        convert_(converted, [0, 1], name)
    assert all(parameter.is_meta for parameter in model.parameters())
    for index, mixer in mixers(model).items():
        assert mixer.options == mixers(real)[index].options
        assert {key: value.shape for key, value in mixer.state_dict().items()} == {
            key: value.shape for key, value in mixers(real)[index].state_dict().items()
        }


def alignment_losses(family: str, name: str, updates: int) -> float:
    """Mean squared error relative to the attention's variance after ``updates`` of regression on its output."""
    model = FAMILIES[family]()
    attention = model.model.layers[2].self_attn
    seen: dict = {}
    hook = attention.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(tiny_models.token_ids(8, 24), use_cache=False)
        hook.remove()
        inputs = {key: seen[key] for key in ("hidden_states", "position_embeddings", "attention_mask")}
        target, _ = attention(**inputs)
    mixer = INITS[name](attention, 2, generator())
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=3e-3)
    for _ in range(updates + 1):
        loss = (mixer(**inputs)[0] - target).pow(2).mean() / target.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@family_of
def test_aligned_learns_the_attention_fastest(family):
    """After 20 updates, measured: phi 0.22 / 0.47 / 0.44, llama 0.41 / 0.79 / 0.72 (aligned / paper / random)."""
    losses = {name: alignment_losses(family, name, 20) for name in INITS}
    assert losses["aligned"] < 0.7 * min(losses["paper"], losses["random"])


def test_fused_projections_are_cut_apart():
    config = Phi3Config(**tiny_models._TEXT, num_key_value_heads=2)
    attention = Phi3ForCausalLM(config).model.layers[1].self_attn
    rows = attention.qkv_proj.weight
    source = read_attention(attention)
    assert torch.equal(torch.cat([source.q, source.k, source.v]), rows)
    assert (source.options(64).num_heads, source.options(64).num_kv_heads) == (4, 2)
    assert torch.equal(parts(init.paper(attention, 1, generator()))["B.weight"], rows[32:48])


def test_unknown_attention_and_unknown_init():
    with pytest.raises(ValueError, match="Linear: unknown attention; expected head_dim"):
        read_attention(nn.Linear(2, 2))
    attention = attention_of("phi")
    attention.q_proj = nn.Linear(32, 64)  # as in families that gate their output
    with pytest.raises(ValueError, match="PhiAttention: heads of unequal widths: q 64, k 32, v 32, output 32"):
        read_attention(attention)
    with pytest.raises(ValueError, match="init 'magic' is not one of aligned, paper, random"):
        convert_(tiny_models.phi(), [0], "magic")


@pytest.mark.parametrize("family", ["phi", "llama"])
@torch.no_grad()
def test_calibrated_heads_have_the_size_of_the_attentions(family):
    """Measured by hand: what the output projection is given, head by head, over the real tokens of both batches."""
    model = FAMILIES[family]()
    batches = [{"input_ids": tiny_models.token_ids(3, 15, seed)} for seed in (0, 1)]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :6] = 0

    def sizes(model: nn.Module) -> Tensor:
        given = []
        part = model.model.layers[0].self_attn
        projection = getattr(part, "out_proj", None) or getattr(part, "dense", None) or part.o_proj
        hook = projection.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
        for batch in batches:
            model(**batch, use_cache=False)
        hook.remove()
        real = [heads[batch["attention_mask"].bool()] for heads, batch in zip(given, batches, strict=True)]
        return torch.cat(real).unflatten(-1, (4, 8)).square().mean((0, 2)).sqrt()

    expected, plain = sizes(model), FAMILIES[family]()
    convert_(model, [0, 2], "aligned", calibrate_on=batches)
    convert_(plain, [0, 2], "aligned")
    torch.testing.assert_close(sizes(model), expected, rtol=1e-4, atol=0)
    assert ((sizes(plain) / expected - 1).abs() > 0.05).any()
    assert (model.config.matvlm["calibrated"], plain.config.matvlm["calibrated"]) == (True, False)
    weights = (mixers(converted)[2].norm_weight for converted in (model, plain))
    assert not torch.equal(*weights)  # every layer is calibrated on the teacher's own states


def test_a_head_that_says_nothing_does_no_harm():
    model = tiny_models.phi()
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[:8], attention.v_proj.bias[:8] = 0.0, 0.0
    convert_(model, [1], "aligned", calibrate_on=[{"input_ids": tiny_models.token_ids(2, 9)}])
    weight = mixers(model)[1].norm_weight
    assert weight[:8].tolist() == [1.0] * 8  # 0 / 0: as it was, and the head is silent for want of values
    assert (weight[8:] != 1.0).all()
    assert weight.isfinite().all()
