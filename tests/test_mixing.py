"""The matrices by which layers mix tokens: against float64, the layers' outputs and transformers' own maps."""

from __future__ import annotations

import math

import pytest
import tiny_families
import tiny_models
import torch
import torch.nn.functional as F
from reference_scan import naive_conv
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.init import INITS, convert_, in_proj_rows
from matvlm.inspection.mixing import mean_distance, mixing_matrix, row_likeness
from matvlm.models.hybrid import decoder_layers, mixers
from matvlm.models.mixer import Mamba2Mixer, rotate
from matvlm.models.watch import Seen, watch

LENGTH = 21
LAYERS = [0, 2]
FAMILIES = {
    "phi": tiny_models.phi,
    "llama": tiny_models.llama,  # two query heads to each key/value head
    "qwen3": tiny_families.FAMILIES["qwen3"].build,  # norms of q and k
}
CLOSE = 1e-5
"""Of a float32 matrix to one in float64, relative to its largest entry. Measured: 4e-7; 1 if rows were a token late."""


def tokens(length: int = LENGTH) -> dict[str, Tensor]:
    return {"input_ids": tiny_models.token_ids(1, length)}


@pytest.fixture(scope="module", params=[(f, i) for f in FAMILIES for i in INITS], ids="-".join)
def hybrid(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, init = request.param
    return tiny_models.trained_hybrid(FAMILIES[family](), LAYERS, init)


def formula(mixer: Mamba2Mixer, shown: Seen) -> tuple[Tensor, Tensor]:
    """The matrix [H, L, L] and the layer's output [L, W] from the mixer's parameters alone, in float64."""
    options, size = mixer.options, mixer.options.head_dim
    value = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    given = F.linear(shown.hidden.double(), value["in_proj.weight"], value.get("in_proj.bias"))
    part = {name: given[..., rows] for name, rows in in_proj_rows(mixer).items()}
    mixed = torch.cat([part["x"], part["B"], part["C"]], -1)
    mixed, _ = naive_conv(mixed, value["conv_weight"], value["conv_bias"], silu=options.conv_silu)
    sizes = [options.num_kv_heads, options.num_kv_heads, options.num_heads]
    x, B, C = mixed.unflatten(-1, (-1, size)).split(sizes, dim=2)
    if options.qk_norm_eps is not None:
        B = F.rms_norm(B, (size,), value["B_norm_weight"], options.qk_norm_eps)
        C = F.rms_norm(C, (size,), value["C_norm_weight"], options.qk_norm_eps)
    if options.rotary:
        cos, sin = (table.double() for table in shown.kwargs["position_embeddings"])
        B, C = rotate(B, cos, sin), rotate(C, cos, sin)
    dt = F.softplus(part["dt"] + value["dt_bias"])[0]
    matrix = torch.zeros(options.num_heads, LENGTH, LENGTH, dtype=torch.float64)
    output = torch.zeros(LENGTH, options.num_heads, size, dtype=torch.float64)
    for head in range(options.num_heads):
        shared = head * options.num_kv_heads // options.num_heads
        for reader in range(LENGTH):
            for read in range(reader + 1):
                faded = math.exp(-dt[read + 1 : reader + 1, head].sum() * value["A_log"][head].exp())
                step = float(dt[read, head]) if options.scale_input_by_dt else 1.0
                matrix[head, reader, read] = C[0, reader, head] @ B[0, read, shared] * faded * step
        matrix[head] += value["D"][head] * torch.eye(LENGTH)
        output[:, head] = matrix[head] @ x[0, :, shared]
    gated = output * F.silu(part["z"][0].unflatten(-1, (-1, size)))
    normed = F.rms_norm(gated, (size,), eps=options.norm_eps).flatten(1) * value["norm_weight"]
    return matrix, F.linear(normed, value["out_proj.weight"], value.get("out_proj.bias"))


def test_a_mixers_matrix_is_the_formula_and_makes_its_output(hybrid: PreTrainedModel) -> None:
    shown = watch(hybrid, mixers(hybrid), tokens())
    for layer, mixer in mixers(hybrid).items():
        matrix, output = formula(mixer, shown[layer])
        found = mixing_matrix(hybrid, layer, tokens())
        torch.testing.assert_close(found.double(), matrix, rtol=0, atol=CLOSE * float(matrix.abs().max()))
        # Outputs up to 9, measured up to 4e-6 apart.
        torch.testing.assert_close(shown[layer].output[0].double(), output, rtol=0, atol=1e-4)
        assert torch.equal(found, found.tril())


def test_attention_beside_mixers_keeps_its_map(hybrid: PreTrainedModel) -> None:
    for layer in set(range(len(decoder_layers(hybrid)))) - set(LAYERS):
        found = mixing_matrix(hybrid, layer, tokens())
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]), rtol=0, atol=1e-6)
        assert torch.equal(found, found.tril())


@pytest.mark.parametrize("name", tiny_families.FAMILIES)
def test_attention_maps_are_those_of_transformers(name: str) -> None:
    family = tiny_families.FAMILIES[name]
    model = family.build()
    inputs = family.sample(model, 9)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    found = [mixing_matrix(model, layer, inputs) for layer in range(4)]
    assert model.config.get_text_config(decoder=True)._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True, use_cache=False).attentions
    for ours, theirs in zip(found, expected, strict=True):
        # Measured up to 4.3e-6: here the vision tower runs eager too.
        torch.testing.assert_close(ours, theirs[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.sum(-1), torch.ones(ours.shape[:2]), rtol=0, atol=1e-6)


def test_looking_changes_nothing(hybrid: PreTrainedModel) -> None:
    def logits() -> Tensor:
        with torch.no_grad():
            return hybrid(**tokens(), use_cache=False).logits

    before = logits()
    first = mixing_matrix(hybrid, LAYERS[0], tokens())
    assert torch.equal(logits(), before)
    assert torch.equal(mixing_matrix(hybrid, LAYERS[0], tokens()), first)


def test_an_image_of_a_vlm_is_part_of_the_matrix() -> None:
    model, inputs = tiny_models.llava(), tiny_models.vlm_inputs(1, 5)
    convert_(model, [1], "aligned")
    length = inputs["input_ids"].shape[1]
    for layer in (0, 1):
        found = mixing_matrix(model, layer, inputs)
        assert found.shape == (4, length, length)
        assert not torch.equal(found, mixing_matrix(model, layer, inputs | {"pixel_values": -inputs["pixel_values"]}))


def test_half_precision_gives_float32_near_the_exact_one() -> None:
    model, inputs = tiny_models.llava(), tiny_models.vlm_inputs(1, 5)
    convert_(model, [1], "aligned", seed=1)
    exact = [mixing_matrix(model, layer, inputs) for layer in (0, 1)]
    model.bfloat16()
    for layer, matrix in enumerate(exact):
        rough = mixing_matrix(model, layer, inputs)  # the image is float32
        assert rough.dtype == torch.float32
        assert row_likeness(matrix, rough).min() > 0.99


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer {layer} does not exist: the model has layers 0 to 3"):
        mixing_matrix(tiny_models.phi(), layer, tokens())


@pytest.mark.parametrize(
    ("ids", "mask", "complaint"),
    [((2, 4), [[1, 1, 1, 1]] * 2, "2 samples"), ((1, 4), [[0, 0, 1, 1]], "2 tokens")],
)
def test_more_than_one_whole_sample_is_refused(ids: tuple[int, int], mask: list[list[int]], complaint: str) -> None:
    inputs = {"input_ids": tiny_models.token_ids(*ids), "attention_mask": torch.tensor(mask)}
    with pytest.raises(ValueError, match=complaint):
        mixing_matrix(tiny_models.phi(), 0, inputs)


def test_distance_of_matrices_that_look_back_a_known_way() -> None:
    itself = torch.eye(6)
    shifted = torch.diag_embed(torch.ones(4), offset=-2) - torch.diag_embed(torch.tensor([1.0, 1, 0, 0, 0, 0]))
    everything = torch.ones(6, 6).tril()
    found = mean_distance(torch.stack([itself, -3 * shifted, everything, torch.ones(6, 6)]))
    # Two back from the third token on; the mean of 0 ... t is t / 2; of all six tokens sum over s < t of (t - s) / 6.
    expected = [0.0, 2 * 4 / 6, 2.5 / 2, sum(t * (t + 1) / 2 for t in range(6)) / 36]
    assert found.tolist() == pytest.approx(expected)


def test_likeness_looks_at_where_and_not_at_how_much() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 5, 5, generator=generator)
    scales = torch.rand(2, 5, 1, generator=generator) + 0.1
    assert row_likeness(first, scales * first).tolist() == pytest.approx([1.0, 1.0])
    assert row_likeness(first, -first).tolist() == pytest.approx([-1.0, -1.0])
    assert row_likeness(torch.eye(5)[None], torch.eye(5).roll(1, 0)[None]).tolist() == [0.0]
