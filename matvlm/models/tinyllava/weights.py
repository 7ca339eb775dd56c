"""The tensors of a released checkpoint, under the names that the transformers model gives them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from matvlm.models import hybrid
from matvlm.models.folder import ModelFolderError, weight_files

PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower._vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "connector._connector.0.",
    "model.multi_modal_projector.linear_2.": "connector._connector.2.",
}
"""Beginning of a name in the model -> in the release."""
MIXER_NAMES = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "norm_weight": "norm.weight"}
"""Of a mixer's tensors, those with another name in the release; its conv1d.weight is [D, 1, K] for our [D, K]."""
UNUSED = re.compile(r"vision_tower\._vision_tower\.vision_model\.(head\..+|embeddings\.position_ids)|.+\.inv_freq")
"""Left out on purpose: SigLIP's pooling head, which LLaVA never asks, and tables that the model computes itself."""
SHOWN = 5
"""Names listed per kind of problem."""


def read_tensors(folder: Path, skeleton: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor of ``skeleton`` from the safetensors files in ``folder``, mapped into memory, not copied there.

    Args:
        folder: the released checkpoint, with one safetensors file or several and an index.
        skeleton: the model to fill; only its names and shapes are looked at.

    Raises:
        ModelFolderError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    files = weight_files(folder)
    if not files:
        raise ModelFolderError(f"{folder}: no *.safetensors there; weights in other formats are not opened")
    layers = hybrid.mixers(skeleton)
    wanted = {released_name(name, layers): name for name in skeleton.state_dict()}
    shapes = {name: list(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found: dict[str, Tensor] = {}
    unknown: list[str] = []
    misshapen: list[str] = []
    for path, name, tensor in _tensors(files):
        if name not in wanted:
            if not UNUSED.fullmatch(name):
                unknown.append(f"{name} ({path.name})")
            continue
        shape = shapes[wanted[name]]
        released = [shape[0], 1, shape[1]] if name.endswith(".mamba.conv1d.weight") else shape
        if list(tensor.shape) != released:
            misshapen.append(f"{name} ({path.name}) is {list(tensor.shape)}, expected {released}")
        found[wanted[name]] = tensor.squeeze(1) if released != shape else tensor
    missing = [name for name, ours in wanted.items() if ours not in found]
    problems = {"missing tensors": missing, "unknown tensors": unknown, "wrongly shaped tensors": misshapen}
    if any(problems.values()):
        told = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise ModelFolderError(f"{folder}: the weights are not those that its config describes: {told}")
    return found


def released_name(name: str, mixer_layers: Collection[int]) -> str:
    """What the release calls the tensor ``name`` of the model whose ``mixer_layers`` hold mixers."""
    for ours, theirs in PREFIXES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    match = re.fullmatch(r"(language_model\.model\.layers\.(\d+)\.)self_attn\.(.+)", name)
    if match and int(match[2]) in mixer_layers:
        return f"{match[1]}mamba.{MIXER_NAMES.get(match[3], match[3])}"
    return name


def _tensors(files: Iterable[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    yield path, name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{path}: cannot be read: {error}; fetch the checkpoint again") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
