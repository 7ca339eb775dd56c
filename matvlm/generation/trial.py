"""Which models' steps the decode kernels compute: those that they compute right."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from matvlm.generation.session import Session
from matvlm.models.hybrid import vision_tower
from matvlm.models.mixer import Mamba2Mixer

if TYPE_CHECKING:
    from matvlm.generation.plan import Layer, Plan

log = logging.getLogger(__name__)

SLOWER = "Every operation of a decoding step is a kernel of its own, which is slower"
TRIAL = 8
"""Tokens that a plan is tried on."""
LIMIT = 1e-3
"""Largest difference of its logits in float32, as Euclidean norms. Measured in Triton's interpreter: at most 4e-6; the
smallest mistake tried makes a difference of 0.16 there (``tests/test_decode_interpreter.py``)."""


@torch.inference_mode()
def find_plan(model: PreTrainedModel) -> Plan | None:
    """How to compute a step of ``model``, on a GPU, in a few kernels a layer; None: by its own modules.

    What is found is tried, and taken if the logits are those of the model's own modules.
    """
    from matvlm.generation.plan import Unknown, read

    try:
        plan = read(model)
        small, seen = _excerpt(model, plan)
        own, planned = (Session(small, 1, TRIAL, TRIAL, each) for each in (None, read(small, seen)))
    except Unknown as error:
        log.warning("%s: %s", SLOWER, error)
        return None
    worst = 0.0
    for token in range(TRIAL):
        logits = []
        for session in (own, planned):
            session.ids.fill_(token)
            session.positions = torch.full_like(session.ids, token)
            session.compute()
            assert session.logits is not None
            logits.append(session.logits)
        worst = max(worst, float((logits[1] - logits[0]).norm() / logits[0].norm()))
    if worst <= LIMIT:
        return plan
    name = type(model).__name__
    log.warning("%s: %s looks like what the kernels know, but its logits differ by %.1g", SLOWER, name, worst)
    return None


def _excerpt(model: PreTrainedModel, plan: Plan) -> tuple[PreTrainedModel, list[int | None]]:
    """A copy of ``model`` in float32, small enough to try things on: one layer of each kind, and no vision tower.

    Returns:
        The copy, and the sliding window of each of its layers.
    """
    decoder: Any = model.get_decoder()
    chosen = {_kind(planned): layer for planned, layer in zip(plan.layers, decoder.layers, strict=True)}
    tower = vision_tower(model)
    copied: dict[int, Any] = {} if tower is None else {id(tower): nn.Identity()}
    layers = [copy.deepcopy(layer, copied) for layer in chosen.values()]
    small: Any = copy.deepcopy(model, copied | {id(decoder.layers): nn.ModuleList(layers)})
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
        if isinstance(layer.self_attn, Mamba2Mixer):
            layer.self_attn.kernels = "torch"  # others round to TF32
    return small.float(), [window for window, *_ in chosen]


def _kind(layer: Layer) -> tuple[int | None, bool, str, bool]:
    """Window, whether it rotates, activation, form; the first two differ within a model, as do mixers."""
    rotary, window = layer.mixing.rotary, getattr(layer.mixing, "window", None)
    return window, rotary, f"{type(layer.mixing).__name__} {layer.activation}", layer.mlp_norm is None
