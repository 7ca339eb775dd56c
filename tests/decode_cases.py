"""The decode kernels' step held against the model's own modules, token by token; for a GPU and Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import torch
from family_table import Case
from tiny_families import batch

from matvlm.generation.plan import Heads, Plan
from matvlm.generation.session import Session

CAPACITY = 32
STEPS = 4


@torch.inference_mode()
def worst_difference(case: Case, sizes: tuple[int, ...], plan: Plan) -> float:
    """Largest Euclidean difference of logits relative to the model's own, over ``STEPS`` tokens after prompts.

    Args:
        sizes: tokens of each prompt; several are padded.
    """
    prompts = [case.family.sample(case.model, size, seed) for seed, size in enumerate(sizes)]
    inputs = {name: value.to(case.model.device) for name, value in batch(prompts).items()}
    own, ours = (Session(case.model, len(sizes), CAPACITY, CAPACITY, each) for each in (None, plan))
    own.prefill(inputs)
    ours.prefill(inputs)
    ids, worst = None, 0.0
    for _ in range(STEPS):
        expected, found = own.step(ids).float(), ours.step(ids).float()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
        ids = expected.argmax(-1)
    return worst


def wrong_plans(plan: Plan) -> dict[str, Plan]:
    """``plan`` with one mistake in every layer that has what the mistake is about."""

    def changed(**values: object) -> Plan:
        return replace(plan, layers=tuple(replace(layer, **values) for layer in plan.layers))

    def mixing(**values: object) -> Plan:
        layers = tuple(
            replace(layer, mixing=replace(layer.mixing, **values)) if isinstance(layer.mixing, Heads) else layer
            for layer in plan.layers
        )
        return replace(plan, layers=layers)

    return {
        "another activation": changed(activation="silu" if plan.layers[0].activation != "silu" else "gelu"),
        "no rotary embedding": mixing(rotary=False),
        "another scale": mixing(scale=1.0),
        "another norm": changed(norm=replace(plan.norm, weight=plan.norm.weight * 1.2)),
    }
