"""How a decoding step is computed in a few kernels a layer, read from a model whose layers are of a known form.

Known are layers that norm once and run attention (or a mixer) beside the MLP, as phi, and those that run them one after
the other, as llama. Everything else (more norms, scaled residuals, several rotary embeddings) is left to the model's
own modules, and so is whatever comes out differently when tried (``matvlm.generation.trial``).
Shapes: W hidden size, H heads of width P, F width of the MLP, V words of vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.kernels.decode.attention import HeadNorms
from matvlm.kernels.decode.linear import Linear, Norm
from matvlm.kernels.decode.mixer import MixerWeights
from matvlm.models.families import output_projection, read_attention, rms_norm, rotates_halves, windows
from matvlm.models.hybrid import decoder_layers
from matvlm.models.mixer import Mamba2Mixer

PARALLEL = {"self_attn", "mlp", "input_layernorm"}
SEQUENTIAL = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
FINAL_NORMS = ("norm", "final_layernorm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


class Unknown(Exception):
    """The model has something that the kernels do not compute; the message says what."""


@dataclass(frozen=True)
class Heads:
    """An attention between its projections."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    rotary: bool
    window: int | None
    norms: HeadNorms | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer: what goes into its token mixing, and what comes out of it and of its MLP."""

    norm: Norm
    inputs: tuple[Linear, ...]
    mixing: Heads | MixerWeights
    output: Linear
    mlp_norm: Norm | None
    """None: the MLP runs beside, on the same normed input."""
    up: tuple[Linear, ...]
    """One matrix, or gate and up."""
    down: Linear
    activation: str


@dataclass(frozen=True)
class Plan:
    """What a step computes, read from a model once."""

    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear


def read(model: PreTrainedModel, seen: Sequence[int | None] | None = None) -> Plan:
    """How to compute a step of ``model``.

    Args:
        seen: the sliding window of each layer, or None; by default the model's configuration is asked.

    Raises:
        Unknown: its layers are of no known form.
    """
    decoder: Any = model.get_decoder()
    width = model.get_input_embeddings().weight.shape[1]
    final = next((getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)), None)
    head: Any = model.get_output_embeddings()
    if final is None or not isinstance(head, nn.Linear) or not hasattr(decoder, "rotary_emb"):
        raise Unknown(f"{type(decoder).__name__}: no norm, head or rotary embedding of a known name")
    config = model.config.get_text_config(decoder=True)
    if (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        raise Unknown(f"{type(decoder).__name__}: positions have several axes (mrope)")
    layers = decoder_layers(model)
    found = windows(model, range(len(layers))) if seen is None else seen
    plan = Plan(
        tuple(_read_layer(layer, window, width) for layer, window in zip(layers, found, strict=True)),
        _read_norm(final, width),
        _linear(head),
    )
    kinds = {p.dtype for p in decoder.parameters()}
    if len(kinds) > 1:
        raise Unknown(f"{type(decoder).__name__}: weights of several dtypes, {sorted(map(str, kinds))}")
    return plan


def _read_layer(layer: nn.Module, window: int | None, width: int) -> Layer:
    parts: Any = layer
    names = {name for name, module in layer.named_children() if not isinstance(module, nn.Dropout)}
    mlp = getattr(layer, "mlp", None)
    up: tuple[Linear, ...]
    if names == PARALLEL and hasattr(mlp, "fc1"):
        up, down, activation = (_linear(parts.mlp.fc1),), parts.mlp.fc2, parts.mlp.activation_fn
    elif names == SEQUENTIAL and hasattr(mlp, "gate_proj"):
        up = (_linear(parts.mlp.gate_proj), _linear(parts.mlp.up_proj))
        down, activation = parts.mlp.down_proj, parts.mlp.act_fn
    elif names == SEQUENTIAL and hasattr(mlp, "gate_up_proj"):
        both = _linear(parts.mlp.gate_up_proj)
        halves = [None, None] if both.bias is None else both.bias.chunk(2)
        first, second = (Linear(w, b) for w, b in zip(both.weight.chunk(2), halves, strict=True))
        up, down, activation = (first, second), parts.mlp.down_proj, parts.mlp.activation_fn
    else:
        raise Unknown(f"{type(layer).__name__}: made of {', '.join(sorted(names))}")
    inputs, mixing, output = _read_mixing(parts.self_attn, window)
    return Layer(
        _read_norm(parts.input_layernorm, width),
        inputs,
        mixing,
        output,
        _read_norm(parts.post_attention_layernorm, width) if names == SEQUENTIAL else None,
        up,
        _linear(down),
        _read_activation(activation),
    )


def _read_mixing(mixing: Any, window: int | None) -> tuple[tuple[Linear, ...], Heads | MixerWeights, Linear]:
    if isinstance(mixing, Mamba2Mixer):
        options = asdict(mixing.options)
        known = {name: options[name] for name in MixerWeights.__dataclass_fields__ if name in options}
        tensors = {name: getattr(mixing, name) for name in MixerWeights.__dataclass_fields__ if name not in known}
        return (_linear(mixing.in_proj),), MixerWeights(**known, **tensors), _linear(mixing.out_proj)
    try:
        read, rotary = read_attention(mixing), rotates_halves(mixing)
    except ValueError as error:
        raise Unknown(str(error)) from error
    if read.lost or getattr(mixing, "softcap", None) or getattr(mixing, "attn_logit_softcapping", None):
        raise Unknown(f"{type(mixing).__name__}: norms of q and k of another kind, or capped scores")
    norms = None
    if read.q_norm is not None and read.k_norm is not None:
        norms = HeadNorms(read.q_norm.weight, read.k_norm.weight, read.q_norm.eps)
    width = read.head_dim
    heads, kv_heads = read.q.shape[0] // width, read.k.shape[0] // width
    inputs = (Linear(read.q, read.q_bias), Linear(read.k, read.k_bias), Linear(read.v, read.v_bias))
    shape = Heads(heads, kv_heads, width, getattr(mixing, "scaling", width**-0.5), rotary, window, norms)
    return inputs, shape, _linear(output_projection(mixing))


def _read_norm(norm: nn.Module, width: int) -> Norm:
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        return Norm(norm.weight, norm.bias, norm.eps)
    found = rms_norm(norm, width)
    if found is None:
        raise Unknown(f"{type(norm).__name__}: neither a layer norm nor an RMS norm")
    return Norm(found.weight, None, found.eps)


def _read_activation(activation: Any) -> str:
    x = torch.linspace(-4.0, 4.0, 33)
    found = next(
        (name for name, known in ACTIVATIONS.items() if torch.allclose(activation(x), known(x), atol=1e-5)), ""
    )
    if not found:
        raise Unknown(f"{type(activation).__name__}: not one of {', '.join(ACTIVATIONS)}")
    return found


def _linear(module: Any) -> Linear:
    if not isinstance(module, nn.Linear):
        raise Unknown(f"{type(module).__name__} where a linear layer was expected")
    return Linear(module.weight, module.bias)
