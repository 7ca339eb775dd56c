"""How a Mamba-2 mixer starts from the attention it replaces.

Each initialisation is a function (attention, layer number, random generator) -> new mixer that leaves the attention as
it is. With one key and query per token, linear attention is a scan without decay: ``h[t] = h[t-1] + v[t] k[t]^T``,
``out[t] = h[t] q[t]``. Hence v -> x, k -> B, q -> C, and the output projection stays what it is (arXiv 2503.13440).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.models import families
from matvlm.models.auto import SECTION
from matvlm.models.families import Attention, read_attention
from matvlm.models.hybrid import decoder_layers, replace_
from matvlm.models.mixer import Mamba2Mixer, MixerOptions, inverse_softplus
from matvlm.models.watch import Seen, real_tokens, watch

log = logging.getLogger(__name__)

GATE_OF_ONE = 1.2784645427610738
"""z with silu(z) = 1."""
HORIZONS = (4.0, 256.0)
"""Tokens after which the fastest and the slowest head of ``aligned`` have forgotten all but 1/e."""


def random(attention: nn.Module, layer_idx: int, generator: torch.Generator, chunk_size: int = 64) -> Mamba2Mixer:
    """Mamba-2's own random initialisation throughout; nothing but the widths comes from ``attention``."""
    return _new_mixer(read_attention(attention).options(chunk_size), layer_idx, generator, like=attention)


@torch.no_grad()
def paper(attention: nn.Module, layer_idx: int, generator: torch.Generator, chunk_size: int = 64) -> Mamba2Mixer:
    """The paper's: ``x <- v, B <- k, C <- q, out <- o``, weights and biases; z, dt, A, D, conv and norm stay random.

    The released code drops the biases of q, k, v and o; here they are copied too.
    """
    source = read_attention(attention)
    mixer = _new_mixer(source.options(chunk_size), layer_idx, generator, like=attention)
    _copy_projections(source, mixer)
    return mixer


@torch.no_grad()
def aligned(attention: nn.Module, layer_idx: int, generator: torch.Generator, chunk_size: int = 64) -> Mamba2Mixer:
    """``paper``, with every other part set so that the mixer starts as rotary linear attention with a fading memory:

        conv = identity, without SiLU           z: weight 0, bias such that silu(z) = 1          D = 0
        A = -1, dt: weight and bias 0, dt_bias = softplus^-1(1 / h)     one horizon h per head, log-spaced 4 ... 256
        C, B <- rotary(norm(C)), rotary(norm(B))
        x <- x / softplus(dt), so that a slow decay does not shrink the input

        =>  y[t] = sum over s <= t of exp(-(t - s) / h) * (rotary(norm(q[t])) . rotary(norm(k[s]))) * v[s]

    norm is the attention's RMS norm of each head of q and k, weights included, where it has one (qwen3, gemma3), and
    rotary is left out where it has none (every fourth layer of smollm3). Attention's ``1 / sqrt(P)``, whatever a family
    has in its place, and the sum's size do not matter: the norm of each head after the scan removes them. All of it
    stays trainable. Nothing is drawn at random.

    The norm also leaves every head at a size of 1, which attention's need not have: ``calibrate`` mends that.

    Raises:
        ValueError: the attention rotates q and k in another way than in halves.
    """
    source = read_attention(attention)
    options = replace(
        source.options(chunk_size),
        in_bias=True,
        conv_silu=False,
        rotary=families.rotates_halves(attention),
        qk_norm_eps=None if source.q_norm is None else source.q_norm.eps,
        scale_input_by_dt=False,
    )
    mixer = _new_mixer(options, layer_idx, generator, like=attention)
    for name in ("in_proj.weight", "in_proj.bias", "conv_weight", "conv_bias", "A_log", "D"):
        mixer.get_parameter(name).zero_()
    _copy_projections(source, mixer)
    for weight, norm in ((mixer.B_norm_weight, source.k_norm), (mixer.C_norm_weight, source.q_norm)):
        if weight is not None and norm is not None:
            weight.copy_(norm.weight)
    mixer.in_proj.bias[: mixer.gate_size] = GATE_OF_ONE
    mixer.conv_weight[:, -1] = 1.0
    first, last = (math.log2(horizon) for horizon in HORIZONS)
    horizons = torch.logspace(first, last, options.num_heads, base=2.0)
    mixer.dt_bias.copy_(inverse_softplus(1.0 / horizons))
    return mixer


INITS: dict[str, Callable[..., Mamba2Mixer]] = {"aligned": aligned, "paper": paper, "random": random}

CALIBRATED = ("aligned",)
"""Initialisations that ``calibrate`` belongs to; the others are what their names say, and nothing more."""


def convert_(
    model: PreTrainedModel,
    layers: Iterable[int],
    init: str,
    seed: int = 0,
    chunk_size: int = 64,
    kernels: str = "auto",
    calibrate_on: Iterable[Mapping[str, Tensor]] = (),
) -> dict[int, nn.Module]:
    """Turn ``model`` into a hybrid, in place: a mixer in the place of the attention of each of ``layers``.

    A layer's random draws depend on ``seed`` and the layer's number only, not on which other layers are replaced. The
    mixers take dtype and device of the attentions and are trainable.

    Args:
        model: a VLM or text-only model with attention in all of its decoder layers.
        layers: see ``matvlm.models.layers.choose_layers``.
        init: a key of ``INITS``.
        chunk_size: most tokens per chunk of the scan.
        kernels: see ``matvlm.kernels.resolve_backend``.
        calibrate_on: batches of the model's inputs for ``calibrate``; none leaves it out.

    Returns:
        The original attentions by layer number, untouched: the teacher's part in a layer loss.

    Raises:
        ValueError: an unknown ``init``, layers that cannot be replaced, or an attention of an unknown form.

    What the mixers do otherwise than the attentions (``families.caveats``) is logged, a warning each, and recorded in
    the model's config.
    """
    if init not in INITS:
        raise ValueError(f"init {init!r} is not one of {', '.join(INITS)}")
    families.check(model)

    def make(attention: nn.Module, layer_idx: int) -> Mamba2Mixer:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer_idx)
        mixer = INITS[init](attention, layer_idx, generator, chunk_size)
        mixer.kernels = kernels
        return mixer.train(model.training)

    batches = list(calibrate_on)
    originals = replace_(model, layers, make, init, lambda mixers: batches and calibrate(model, mixers, batches))
    getattr(model.config, SECTION)["calibrated"] = bool(batches)
    found = families.caveats(model, originals, init)
    getattr(model.config, SECTION)["caveats"] = found
    for caveat in found:
        log.warning("%s: %s", type(model).__name__, caveat)
    return originals


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, mixers: Mapping[int, Mamba2Mixer], batches: Iterable[Mapping[str, Tensor]]
) -> None:
    """Give the heads of ``mixers`` the size of those of the attentions that they are to replace, in place.

    A mixer's heads leave its norm with a root mean square of 1. Attention's are averages over the values of many
    tokens, often much smaller, and differ from head to head; a layer that answers ten times too loud drowns the rest.
    So each head's part of ``norm_weight`` is multiplied by ``rms(attention's head) / rms(mixer's head)``, both taken
    over the real tokens of ``batches``, before the output projection.

    Args:
        model: the teacher, whole, in evaluation mode; it is not changed.
        mixers: by layer number, on the model's device.
        batches: inputs of the model, moved to its device; ``attention_mask`` [B, L] is optional.

    Raises:
        ValueError: a layer is no attention any more, or has an attention of an unknown form.
    """
    decoder = decoder_layers(model)
    attentions: dict[int, Any] = {layer: decoder[layer].self_attn for layer in mixers}
    outputs = {layer: families.output_projection(attention) for layer, attention in attentions.items()}
    sums = {layer: torch.zeros(2, mixer.options.num_heads, device=model.device) for layer, mixer in mixers.items()}
    for batch in batches:
        inputs = {name: value.to(model.device) for name, value in batch.items()}
        real = real_tokens(inputs)
        for layer, shown in watch(model, attentions, inputs).items():
            mixer = mixers[layer]
            for row, (module, output) in enumerate(
                ((attentions[layer], outputs[layer]), (mixer, mixer.out_proj)),
            ):
                heads = _given_to(output, module, shown)[real].unflatten(-1, (mixer.options.num_heads, -1))
                sums[layer][row] += heads.float().square().sum((0, 2))
    for layer, mixer in mixers.items():
        theirs, ours = sums[layer].clamp_min(torch.finfo(torch.float32).tiny)
        mixer.norm_weight.mul_((theirs / ours).sqrt().repeat_interleave(mixer.options.head_dim))


def _given_to(projection: nn.Module, module: nn.Module, shown: Seen) -> Tensor:
    """What ``projection``, the last part of ``module``, is given when ``module`` is given what was ``shown``."""
    given: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _module, args: given.append(args[0]))
    try:
        module(hidden_states=shown.hidden, **shown.kwargs)
    finally:
        hook.remove()
    return given[0]


def _new_mixer(options: MixerOptions, layer_idx: int, generator: torch.Generator, like: nn.Module) -> Mamba2Mixer:
    """A randomly initialised mixer with the dtype and device of ``like``; the draws are made in float32 on the CPU."""
    weight = next(like.parameters())
    # torch's own layers draw from the global generator before their weights are drawn again from ours.
    with torch.random.fork_rng(devices=[]), torch.device("meta" if weight.is_meta else "cpu"):
        mixer = Mamba2Mixer(options, layer_idx, generator=generator)
    return mixer.to(dtype=weight.dtype, device=weight.device)


def _copy_projections(source: Attention, mixer: Mamba2Mixer) -> None:
    rows = in_proj_rows(mixer)
    for part, weight, bias in (
        ("x", source.v, source.v_bias),
        ("B", source.k, source.k_bias),
        ("C", source.q, source.q_bias),
    ):
        mixer.in_proj.weight[rows[part]] = weight
        if mixer.in_proj.bias is not None:
            mixer.in_proj.bias[rows[part]] = 0.0 if bias is None else bias
    mixer.out_proj.weight.copy_(source.o)
    if source.o_bias is not None:
        mixer.out_proj.bias.copy_(source.o_bias)


def in_proj_rows(mixer: Mamba2Mixer) -> dict[str, slice]:
    """Where each of z, x, B, C and dt is among the outputs of ``mixer.in_proj``."""
    sizes = [mixer.gate_size, *mixer.split_sizes, mixer.options.num_heads]
    ends = list(accumulate(sizes))
    return {
        name: slice(end - size, end) for name, size, end in zip(("z", "x", "B", "C", "dt"), sizes, ends, strict=True)
    }
