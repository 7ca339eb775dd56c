"""What a model is and costs, hybrid or not: layers, parameters, decoding state, bytes that a decode step moves.

Only its config.json is read: the model is built on PyTorch's ``meta`` device, with real shapes but no weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from matvlm.costs import DecodeCost, decode_cost
from matvlm.inspection.skeleton import build_plain, build_uri
from matvlm.inspection.text import heading, size_text, table
from matvlm.models import hybrid
from matvlm.models.auto import SECTION

CONTEXTS = (1024, 4096, 16384, 65536)


def describe_model(uri: str, contexts: Sequence[int] = CONTEXTS) -> str:
    """Everything that is known about the model at ``uri``, as text for a terminal.

    Args:
        uri: as for ``matvlm.models.locate.locate``.
        contexts: lengths in tokens to give costs at.

    Raises:
        Unreachable: its config.json cannot be read, or is of no architecture that transformers has.
    """
    model = build_uri(uri)
    costs = {"model": decode_cost(model)}
    trained: list[nn.Parameter] = []
    total = None
    if hybrid.mixers(model):
        teacher = build_plain(model)
        costs = {"teacher": decode_cost(teacher), "hybrid": costs["model"]}
        with_connector = hybrid.find_connector(model) is not None
        trained, total = list(hybrid.trained_parameters(model, with_connector).values()), count(teacher.parameters())
    parts = [
        heading("Model", _facts(uri, model)),
        heading("Parameters", parameter_table(model, trained, total)),
        heading("Decoding state (batch 1)", state_table(costs, contexts)),
        heading("Bytes of a decode step (batch 1)", decode_table(costs, contexts)),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(uri: str, model: Any) -> str:
    layers = sorted(hybrid.mixers(model))
    total = len(hybrid.decoder_layers(model))
    lines = [uri, f"{type(model).__name__} ({model.config.model_type}), {str(model.dtype).removeprefix('torch.')}"]
    if not layers:
        return "\n".join([*lines, f"{total} decoder layers, all attention"])
    section = getattr(model.config, SECTION)
    share = f"{len(layers)} of {total} decoder layers are Mamba-2 ({len(layers) / total:.1%})"
    provenance = section.get("provenance", {})
    lines += [f"{share}: {', '.join(map(str, layers))}", f"start: {section['init']}"]
    lines += [f"{name}: {provenance[name]}" for name in ("teacher", "updates") if name in provenance]
    return "\n".join([*lines, *(f"caveat: {caveat}" for caveat in section.get("caveats", []))])


def parameter_table(model: Any, trained: Iterable[nn.Parameter], teacher_parameters: int | None) -> str:
    """Parameters by what they belong to, and which of them distillation trains."""
    learnt = {id(parameter) for parameter in trained}
    rows = [["", "total", "trained", "frozen"]]
    for name, parameters in [*_parts(model), ("hybrid" if learnt else "model", list(model.parameters()))]:
        total, moving = count(parameters), count(p for p in parameters if id(p) in learnt)
        rows.append([name, f"{total:,}", f"{moving:,}", f"{total - moving:,}"])
    if teacher_parameters is not None:
        rows.append(["teacher", f"{teacher_parameters:,}", "", f"{teacher_parameters:,}"])
    return table(rows if learnt else [row[:2] for row in rows])


def state_table(costs: Mapping[str, DecodeCost], contexts: Sequence[int]) -> str:
    """The cache of one sequence."""
    rows = [["", "per token", "per sequence", *(f"{context:,} tokens" for context in contexts)]]
    for name, cost in costs.items():
        sizes = (cost.per_token, cost.per_sequence, *map(cost.cache, contexts))
        rows.append([name, *map(size_text, sizes)])
    return table(rows)


def decode_table(costs: Mapping[str, DecodeCost], contexts: Sequence[int]) -> str:
    """The bytes that one token costs; their ratio bounds what the layers alone can gain on one stack."""
    rows = [["", "weights", *(f"{context:,} tokens" for context in contexts)]]
    for name, cost in costs.items():
        rows.append([name, *map(size_text, (cost.weights, *map(cost.step, contexts)))])
    note = ""
    if len(costs) == 2:
        first, second = costs.values()
        ratios = [first.step(context) / second.step(context) for context in contexts]
        rows.append(["ratio", f"{first.weights / second.weights:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
        note = "\nthe ratio is the most that these layers can speed up decoding where memory bandwidth is the limit"
    return table(rows) + note


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _parts(model: Any) -> list[tuple[str, list[nn.Parameter]]]:
    """The model's parameters by what they belong to; each parameter once."""
    mixers = [p for mixer in hybrid.mixers(model).values() for p in mixer.parameters()]
    head = model.get_output_embeddings()
    sources = [
        ("Mamba-2 mixers", mixers),
        ("attention", [p for name, p in model.get_decoder().named_parameters() if ".self_attn." in name]),
        ("embeddings", list(model.get_input_embeddings().parameters())),
        ("rest of the decoder", list(model.get_decoder().parameters())),
        ("output head", list(head.parameters()) if head is not None else []),
        ("vision tower", list(_vision_tower(model).parameters())),
        ("connector and other", list(model.parameters())),
    ]
    seen: set[int] = set()
    parts = []
    for name, parameters in sources:
        fresh = [p for p in parameters if id(p) not in seen]
        seen |= {id(p) for p in fresh}
        if fresh:
            parts.append((name, fresh))
    return parts


def _vision_tower(model: Any) -> nn.Module:
    """The image encoder, or an empty module for a text-only model."""
    tower = model.get_encoder("image")
    return nn.Module() if tower is model else tower
