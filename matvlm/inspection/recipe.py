"""What a recipe will do, said before anything runs: layers, parameters, cache, memory, updates, size of the targets.

The models are built from the teacher's config alone on PyTorch's ``meta`` device: real shapes, no weights, no memory.
Where that config cannot be reached, all that does not need it is still said. Figures marked "about" are estimates.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml
from torch import nn

from matvlm import init
from matvlm.config import Data, Recipe, Targets
from matvlm.costs import DecodeCost, decode_cost, tensor_bytes
from matvlm.distill.schedule import num_updates
from matvlm.inspection.model import count, decode_table, parameter_table, state_table
from matvlm.inspection.skeleton import Unreachable, build
from matvlm.inspection.text import heading, size_text, table
from matvlm.models import hybrid
from matvlm.models.layers import SENSITIVITY, choose_layers

ADAM_BYTES = 8
"""Two float32 moments of a trained parameter."""
MASTER_BYTES = 4
"""The float32 copy that the optimiser of 16-bit weights keeps."""
GRADIENT_BYTES = 4
MLP_WIDTHS = {"gelu_new": 4, "silu": 3}
"""Activations of which autograd keeps more than one MLP width: GELU spelt out in steps, and the gated form."""
ANSWER_TOKENS = 2
"""Of an easy-VQA answer: one word and the end mark."""


@dataclass(frozen=True)
class _Model:
    """The hybrid on ``meta``, and what was noted of the teacher before it became that."""

    hybrid: Any
    originals: dict[int, nn.Module]
    """The attentions that the mixers replaced, by layer."""
    trained: dict[str, nn.Parameter]
    teacher_parameters: int
    teacher_cost: DecodeCost

    @property
    def config(self) -> Any:
        return self.hybrid.config.get_text_config(decoder=True)

    @property
    def costs(self) -> dict[str, DecodeCost]:
        return {"teacher": self.teacher_cost, "hybrid": decode_cost(self.hybrid)}


def describe(recipe: Recipe) -> str:
    """Everything that is known about a run of ``recipe`` before it starts, as text for a terminal.

    Raises:
        ValueError: the recipe's layers do not fit the teacher (all of them replaced, out of range).
    """
    parts = [heading("Recipe", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip())]
    vocabulary = None
    try:
        model = _build(recipe)
    except Unreachable as reason:
        parts.append(heading("Model", f"{reason}\nLayers, parameters, cache and memory are not shown."))
    else:
        vocabulary = model.config.vocab_size
        parts += [
            heading("Layers", _layers(recipe, model)),
            heading("Parameters", parameter_table(model.hybrid, model.trained.values(), model.teacher_parameters)),
            heading("Decoding state (batch 1)", state_table(model.costs, recipe.profile.lengths)),
            heading("Bytes of a decode step (batch 1)", decode_table(model.costs, recipe.profile.lengths)),
            heading("Memory of distillation, per device", _memory(recipe, model)),
        ]
    samples, turns = count_samples(recipe.data)
    parts.append(heading("Updates", _updates(recipe, samples)))
    parts.append(heading("Teacher targets", _targets(recipe.targets, vocabulary, turns)))
    return "\n\n".join(parts) + "\n"


def count_samples(data: Data) -> tuple[int | None, int | None]:
    """(samples, question-answer turns) of the training data; None for what only preparing it can tell.

    Conversations longer than ``max_turns`` become several samples. Where ``max_samples`` conversations are drawn, they
    are taken for average ones.
    """
    if data.source != "easyvqa":
        return (None if data.max_turns else data.max_samples), None
    import easy_vqa

    turns = Counter(easy_vqa.get_train_questions()[2]).values()
    samples = sum(math.ceil(count / (data.max_turns or count)) for count in turns)
    share = min(1.0, (data.max_samples or len(turns)) / len(turns))
    return round(samples * share), round(sum(turns) * share)


def saved_bytes_per_token(config: Any, num_mixers: int, value_bytes: int) -> int:
    """About what autograd keeps of the decoder per trained token, where only the mixers' parameters are trained.

    5.2 hidden widths a layer, 20 in float32 a mixer, and ``MLP_WIDTHS``: fitted to the small VLM (float32, 200 tokens),
    where 37.6 KB were measured without mixers and 77.0 KB with four, estimated 37.7 and 78.6. For Phi-2 in bfloat16
    without mixers it says 3.5 MB, where 3.4 MB were measured on an H100.
    """
    mlp = MLP_WIDTHS.get(config.hidden_act, 1) * config.intermediate_size
    per_layer = (5.2 * config.hidden_size + mlp) * value_bytes
    return int(config.num_hidden_layers * per_layer + num_mixers * 20 * config.hidden_size * 4)


def _build(recipe: Recipe) -> _Model:
    model, wanted = build(recipe.teacher), recipe.hybrid
    teacher_parameters, teacher_cost = count(model.parameters()), decode_cost(model)
    rule = "even" if wanted.layers == SENSITIVITY else wanted.layers  # as many layers, and of the same size
    layers = choose_layers(len(hybrid.decoder_layers(model)), wanted.ratio, rule)
    originals = init.convert_(model, layers, wanted.init, recipe.seed, wanted.chunk_size, wanted.kernels)
    trained = hybrid.trained_parameters(model, recipe.distill.train_connector)
    return _Model(model, originals, trained, teacher_parameters, teacher_cost)


def _layers(recipe: Recipe, model: _Model) -> str:
    total = len(hybrid.decoder_layers(model.hybrid))
    replaced = sorted(model.originals)
    measured = recipe.hybrid.layers == SENSITIVITY
    which = "those that init_hybrid measures to matter least" if measured else ", ".join(map(str, replaced))
    return (
        f"{len(replaced)} of {total} decoder layers become Mamba-2 ({len(replaced) / total:.1%}): {which}\n"
        f"start: {recipe.hybrid.init}" + "".join(f"; also distilled: {name}" for name in recipe.hybrid.compare_inits)
    )


def _memory(recipe: Recipe, model: _Model) -> str:
    """ZeRO stage 1 splits the optimiser over the GPUs, stage 2 the gradients too."""
    distill, gpus = recipe.distill, recipe.resources.gpu
    sharded = distill.engine == "deepspeed" or (distill.engine == "auto" and gpus > 0)
    stage, devices = (distill.deepspeed.zero_stage, max(gpus, 1)) if sharded else (0, 1)
    weights = list(model.hybrid.parameters()) + [p for module in model.originals.values() for p in module.parameters()]
    value_bytes = max(p.element_size() for p in model.hybrid.parameters())
    master = MASTER_BYTES if value_bytes < MASTER_BYTES else 0
    trained = count(model.trained.values())
    activation_bytes = 2 if distill.autocast == "bfloat16" else value_bytes
    tokens = distill.micro_batch_size * recipe.data.max_length
    per_token = saved_bytes_per_token(model.config, len(model.originals), activation_bytes)
    sizes = {
        "weights, replaced attention included": sum(map(tensor_bytes, weights)),
        "gradients": trained * GRADIENT_BYTES // (devices if stage >= 2 else 1),
        "optimiser": trained * (ADAM_BYTES + master) // devices,
        f"activations, {distill.micro_batch_size} x {recipe.data.max_length} tokens at most": tokens * per_token,
    }
    rows = [[name, f"about {size_text(size)}"] for name, size in [*sizes.items(), ("sum", sum(sizes.values()))]]
    split = f"ZeRO stage {stage} over {devices} GPUs" if sharded else "one device, no sharding"
    return f"{table(rows)}\n{split}; logits, buffers and the framework itself come on top"


def _updates(recipe: Recipe, samples: int | None) -> str:
    """A line for each stage, and one for each weight that changes."""
    distill, stages = recipe.distill, []
    if distill.align.updates:
        stages.append(
            f"alignment first: {distill.align.updates:,}, mixers alone on the teacher's hidden states, learning rate "
            f"{distill.align.lr:g}"
        )
    stages.append(("then end to end: " if stages else "") + _end_to_end(recipe, samples))
    weights = [
        f"weight of {name}: {ramp.start:g} to {ramp.to:g} in {ramp.updates:,} updates, then constant"
        for name, ramp in distill.loss.ramps.items()
    ]
    return "\n".join([*stages, *weights])


def _end_to_end(recipe: Recipe, samples: int | None) -> str:
    distill = recipe.distill
    limit = distill.max_updates
    if samples is None:
        bound = f"; at most {limit:,} (distill.max_updates)" if limit else ""
        return f"unknown until data is prepared: one per {distill.batch_size} samples{bound}"
    per_epoch = math.ceil(samples / distill.batch_size)
    total = num_updates(distill, samples) - distill.align.updates
    schedule = distill.schedule
    stable = total - schedule.warmup_updates - schedule.decay_updates
    about = "about " if recipe.data.max_samples else ""
    cosine = schedule.shape == "cosine"
    rest = "down a cosine" if cosine else f"stable, {schedule.decay_updates:,} decay"
    text = (
        f"{about}{samples:,} samples / {distill.batch_size} = {per_epoch:,} an epoch, {total:,} in all: "
        f"{schedule.warmup_updates:,} warm-up, {max(stable, 0):,} {rest}"
    )
    longer = "warm-up is" if cosine else "warm-up and decay are"
    return text if stable >= 0 else f"{text}\nwarning: {longer} longer than the run"


def _targets(settings: Targets, vocabulary: int | None, turns: int | None) -> str:
    id_bytes = 4 if vocabulary is None or vocabulary > 2**16 else 2
    sampled = settings.scheme == "topk_sampled"
    per_token = settings.top_k * (id_bytes + 2) + 2 + (settings.samples * id_bytes if sampled else 0)
    rest = f"{settings.samples} draws from the rest" if sampled else "one tail bucket"
    where = {"answer": "answer token", "text": "text token", "all": "token"}[settings.positions]
    text = f"{per_token} B per {where} (top {settings.top_k} and {rest}), {settings.shards} shards"
    if turns is None or settings.positions != "answer":
        return f"{text}; total unknown until data is prepared"
    return (
        f"{text}: about {size_text(turns * ANSWER_TOKENS * per_token)} for {turns:,} answers of {ANSWER_TOKENS} tokens"
    )
