"""What a model family's attention consists of, and what of it a Mamba-2 mixer cannot take over.

``check`` refuses a model that cannot become a hybrid, ``read_attention`` reads one attention's weights, and ``caveats``
says in words what a conversion will lose. Wherever it can, this goes by what modules do, not by what they are called.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from matvlm.models.mixer import MixerOptions, rotate

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
BIDIRECTIONAL = {
    "paligemma": "the image and the prompt",
    "gemma3": "an image's tokens",
    "gemma4": "an image's tokens",
    "gemma4_unified": "an image's tokens",
}
"""Model type -> the tokens that see each other in both directions."""


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm over each head: the factors [P] it multiplies by (gemma's stored weights are these minus 1)."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Attention:
    """An attention's weights [out, in] and biases [out] or None; q has H heads, k and v have KV, of width P."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None
    head_dim: int
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    lost: tuple[str, ...] = ()
    """Names of its norms that no mixer has a place for."""

    def options(self, chunk_size: int) -> MixerOptions:
        """Those of a plain Mamba-2 mixer with this attention's widths, and with biases where the attention has any."""
        return MixerOptions(
            hidden_size=self.q.shape[1],
            num_heads=self.q.shape[0] // self.head_dim,
            num_kv_heads=self.k.shape[0] // self.head_dim,
            head_dim=self.head_dim,
            in_bias=any(bias is not None for bias in (self.q_bias, self.k_bias, self.v_bias)),
            out_bias=self.o_bias is not None,
            chunk_size=chunk_size,
        )


def check(model: PreTrainedModel) -> None:
    """Raise ValueError, with the class and the reason, if the layers of ``model`` are not plain causal attentions."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name}: an encoder-decoder model; only decoder-only models can become hybrids")
    decoder: Any = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{name}: its decoder {type(decoder).__name__} has no list of layers named 'layers'")
    for index, layer in enumerate(layers):
        if not hasattr(layer, "self_attn"):
            found = ", ".join(child for child, _ in layer.named_children())
            raise ValueError(f"{name}: layer {index} has no self_attn, only {found}: nothing there to replace")
    config = model.config.get_text_config(decoder=True)
    odd = sorted(set(getattr(config, "layer_types", None) or []) - ATTENTION_KINDS)
    if odd:
        raise ValueError(f"{name}: layers of the kinds {', '.join(odd)}: it is a hybrid of other kinds already")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{name}: some layers read the keys and values of others, which a mixer does not have")
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if (both_ways or not getattr(config, "is_causal", True)) and model.config.model_type not in BIDIRECTIONAL:
        raise ValueError(f"{name}: its tokens attend in both directions; Mamba-2 layers read from left to right only")


def read_attention(attention: nn.Module) -> Attention:
    """The weights of ``attention``: q/k/v_proj or a fused qkv_proj, o_proj or dense, and the norms of its heads.

    Raises:
        ValueError: it lacks one of these, has other weights (attention sinks, an output gate), or heads that a mixer
            cannot have.
    """
    name = type(attention).__name__
    head_dim = getattr(attention, "head_dim", None)
    out = output_projection(attention)
    fused: Any = getattr(attention, "qkv_proj", None)
    parts: list[Any] = [getattr(attention, f"{part}_proj", None) for part in "qkv"]
    if head_dim is None or out is None or (fused is None and None in parts):
        raise ValueError(
            f"{name}: unknown attention; expected head_dim, q_proj, k_proj, v_proj (or qkv_proj) and o_proj (or dense)"
        )
    if fused is not None:
        inner = out.weight.shape[1]
        kv = (fused.weight.shape[0] - inner) // 2
        weights = list(fused.weight.split([inner, kv, kv]))
        biases = [None] * 3 if fused.bias is None else list(fused.bias.split([inner, kv, kv]))
    else:
        weights, biases = [part.weight for part in parts], [part.bias for part in parts]
    (q, k, v), (q_bias, k_bias, v_bias) = weights, biases
    if q.shape[0] != out.weight.shape[1] or k.shape != v.shape:
        raise ValueError(
            f"{name}: heads of unequal widths: q {q.shape[0]}, k {k.shape[0]}, v {v.shape[0]}, "
            f"output {out.weight.shape[1]}"
        )
    known = {"qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "dense"}
    more = {parameter.partition(".")[0] for parameter, _ in attention.named_parameters()} - known
    odd = sorted(part for part in more if "norm" not in part)
    if odd:
        raise ValueError(f"{name}: a mixer has no place for its {', '.join(odd)}")
    read = Attention(q, k, v, out.weight, q_bias, k_bias, v_bias, out.bias, head_dim)
    return _with_norms(read, attention)


def output_projection(attention: nn.Module) -> Any:
    """The linear layer that an attention's heads go through last; None if it has none of a known name."""
    return getattr(attention, "o_proj", None) or getattr(attention, "dense", None)


def rotates_halves(attention: nn.Module) -> bool:
    """Whether ``attention`` has rotary embeddings, as some layers of smollm3 and exaone4 have not.

    Raises:
        ValueError: it has, but they do not pair the first half of a head with the second.
    """
    try:
        if not _reads_positions(attention):
            return False
        family: Any = sys.modules[type(attention).__module__]
        heads = torch.linspace(-1.0, 2.0, 16).reshape(1, 2, 1, 8)
        angles = torch.linspace(0.1, 2.0, 8).reshape(1, 2, 4).repeat(1, 1, 2)
        cos, sin = angles.cos(), angles.sin()
        turned, _ = family.apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)
        known = torch.allclose(turned, rotate(heads, cos, sin), atol=1e-5)
    except (AttributeError, TypeError, RuntimeError):  # called in a way that this family does not know
        known = False
    if not known:
        raise ValueError(f"{type(attention).__name__}: init aligned does not know its rotary embedding: use init paper")
    return True


@torch.no_grad()
def rms_norm(norm: nn.Module | None, width: int) -> HeadNorm | None:
    """What ``norm`` multiplies by, if it is an RMS norm of vectors of ``width``; None if it is anything else."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weights = [] if norm is None else list(norm.parameters())
    if norm is None or eps is None or len(weights) > 1 or any(weight.shape != (width,) for weight in weights):
        return None
    if weights and weights[0].is_meta:
        return HeadNorm(weights[0], eps)
    device = weights[0].device if weights else torch.device("cpu")
    trial = copy.deepcopy(norm).float()
    factors = trial(torch.full((width,), 1024.0, device=device))  # so large that eps does not matter
    vector = torch.linspace(-1.0, 2.0, width, device=device)
    same = torch.allclose(trial(vector), F.rms_norm(vector, (width,), factors, eps), rtol=1e-4, atol=1e-5)
    return HeadNorm(factors, eps) if same else None


def caveats(model: PreTrainedModel, attentions: Mapping[int, nn.Module], init: str) -> list[str]:
    """What Mamba-2 does otherwise than the attentions it replaces in ``model``, beyond what holds for every model.

    Args:
        model: before or after its conversion.
        attentions: those to replace, or replaced already (what ``convert_`` returns), by layer number.
        init: a name of ``matvlm.init.INITS``.

    Returns:
        One sentence each, for a log or a model card; none for a plain causal decoder.
    """
    layers = sorted(attentions)
    config = model.config.get_text_config(decoder=True)
    found = []
    if model.config.model_type in BIDIRECTIONAL:
        found.append(
            f"{model.config.model_type}: {BIDIRECTIONAL[model.config.model_type]} attend to each other in both "
            f"directions; the Mamba-2 layers {layers} read from left to right only"
        )
    for window, where in _windows(model, layers).items():
        found.append(
            f"the layers {where} saw the last {window} tokens only; as Mamba-2 they have a fading memory without that "
            "limit"
        )
    if (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        found.append(
            "positions in an image have height and width (mrope); init aligned rotates by all of them, but the "
            "Mamba-2 layers' memory fades by the order of the tokens"
        )
    lost: dict[str, list[int]] = {}
    for index in layers:
        read = read_attention(attentions[index])
        names = read.lost + (("q_norm", "k_norm") if read.q_norm and init != "aligned" else ())
        if names:
            lost.setdefault(", ".join(names), []).append(index)
    for names_lost, where in lost.items():
        found.append(f"the attention of the layers {where} had {names_lost}, which init {init} drops")
    return found


def windows(model: PreTrainedModel, layers: Sequence[int]) -> list[int | None]:
    """The sliding window, in tokens, of the attention in each of ``layers``; None: it sees all that came before."""
    slots = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    found = [getattr(slots[index], "sliding_window", None) if index < len(slots) else None for index in layers]
    return [None if window is None else int(window) for window in found]


def _windows(model: PreTrainedModel, layers: list[int]) -> dict[int, list[int]]:
    """Window in tokens -> those of ``layers`` that have it, unless it is as long as the model's longest input."""
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None) or float("inf")
    by_window: dict[int, list[int]] = {}
    for index, window in zip(layers, windows(model, layers), strict=True):
        if window is not None and window < longest:
            by_window.setdefault(window, []).append(index)
    return by_window


def _with_norms(read: Attention, attention: nn.Module) -> Attention:
    """``read`` with the norms of ``attention``: kept where both q and k have an RMS norm of each head, else lost."""
    names = tuple(sorted(name for name, _ in attention.named_children() if "norm" in name))
    q_norm, k_norm = (rms_norm(getattr(attention, name, None), read.head_dim) for name in ("q_norm", "k_norm"))
    if q_norm is None or k_norm is None or q_norm.eps != k_norm.eps:
        return replace(read, lost=names)
    return replace(read, q_norm=q_norm, k_norm=k_norm, lost=tuple(n for n in names if n not in ("q_norm", "k_norm")))


@torch.no_grad()
def _reads_positions(attention: nn.Module) -> bool:
    """Whether the output of ``attention`` depends on position_embeddings: tried with some that are not a number."""
    if "position_embeddings" not in inspect.signature(attention.forward).parameters:
        return False
    read = read_attention(attention)
    if read.q.is_meta:
        return bool(getattr(attention, "use_rope", True))
    trial: Any = copy.copy(attention)
    if hasattr(attention, "config"):
        trial.config = copy.copy(attention.config)
        trial.config._attn_implementation = "eager"
    hidden = read.q.new_ones(1, 1, read.q.shape[1])
    nowhere = read.q.new_full((1, 1, getattr(attention, "rotary_ndims", read.head_dim)), float("nan"))
    output, _ = trial(hidden_states=hidden, position_embeddings=(nowhere, nowhere), attention_mask=None)
    return bool(output.isnan().any())
