"""The vision tower runs once for a batch and its parts, and nothing else changes, in every family of VLMs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, batch

from matvlm.data.encoding import Batch
from matvlm.distill.vision import Vision
from matvlm.models.hybrid import vision_tower

VLMS = [name for name, family in FAMILIES.items() if family.images is not None]


def as_batch(samples: list[Any]) -> Batch:
    inputs = batch(samples)
    return Batch([str(number) for number in range(len(samples))], inputs, torch.zeros_like(inputs["input_ids"]))


@torch.no_grad()
@pytest.mark.parametrize("name", VLMS)
def test_parts_see_what_the_whole_saw(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    samples = [family.sample(model, length, seed) for seed, length in enumerate((24, 27, 25))]
    whole, parts = as_batch(samples), [as_batch(samples[:1]), as_batch(samples[1:])]

    def hidden(given: Batch) -> torch.Tensor:
        states: torch.Tensor = model.base_model(**given.inputs, use_cache=False).last_hidden_state
        return states

    alone = [hidden(given) for given in (whole, *parts)]
    tower = vision_tower(model)
    calls: list[int] = []
    if tower is not None:
        compute: Any = tower.forward
        vars(tower)["forward"] = lambda *args, **kwargs: calls.append(1) or compute(*args, **kwargs)
    vision = Vision(model, tower, whole)
    with vision.shared():
        shared = [hidden(given) for given in (whole, *parts, whole)]
    assert torch.equal(shared[0], alone[0])
    assert torch.equal(shared[3], alone[0])
    for one, other in zip(shared[1:3], alone[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # measured: 6e-6
    assert len(calls) == (0 if tower is None else 1 if vision.output is not None else 5)


def test_which_families_share() -> None:
    """A tower that holds the connector, or that answers with other rows than it was given, runs each time."""
    shared = set()
    for name in VLMS:
        family = FAMILIES[name]
        model = family.build().eval()
        vision = Vision(model, vision_tower(model), as_batch([family.sample(model, 24, seed) for seed in (0, 1)]))
        shared |= {name} if vision.output is not None else set()
    assert shared >= {"llava", "llava_next", "llava_onevision"}
    print(sorted(shared), "of", VLMS)
