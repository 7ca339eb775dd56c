"""What a recipe will do, said before anything runs: layers, parameters, cache, memory, updates, size of the targets.

The models are built from the teacher's config alone on PyTorch's ``meta`` device: real shapes, no weights, no memory.
Where that config cannot be reached, all that does not need it is still said. Figures marked "about" are estimates.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import DynamicCache

from matvlm import init
from matvlm.config import Data, Recipe, Targets
from matvlm.inspection.skeleton import Unreachable, build
from matvlm.models import hybrid
from matvlm.models.layers import choose_layers
from matvlm.models.mixer import Mamba2Mixer
from matvlm.profiling import cache_bytes, tensor_bytes

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
class CacheCost:
    """Bytes of decoding state: what every token adds, and what a sequence has whatever its length."""

    per_token: int
    per_sequence: int

    def at(self, tokens: int) -> int:
        return self.per_sequence + tokens * self.per_token


@dataclass(frozen=True)
class _Model:
    """The hybrid on ``meta``, and what was noted of the teacher before it became that."""

    hybrid: Any
    originals: dict[int, nn.Module]
    """The attentions that the mixers replaced, by layer."""
    trained: dict[str, nn.Parameter]
    teacher_parameters: int
    teacher_kv: list[int]
    """Bytes that each layer caches per token."""

    @property
    def config(self) -> Any:
        return self.hybrid.config.get_text_config(decoder=True)


def describe(recipe: Recipe) -> str:
    """Everything that is known about a run of ``recipe`` before it starts, as text for a terminal.

    Raises:
        ValueError: the recipe's layers do not fit the teacher (all of them replaced, out of range).
    """
    parts = [_heading("Recipe", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False).rstrip())]
    vocabulary = None
    try:
        model = _build(recipe)
    except Unreachable as reason:
        parts.append(_heading("Model", f"{reason}\nLayers, parameters, cache and memory are not shown."))
    else:
        vocabulary = model.config.vocab_size
        parts += [
            _heading("Layers", _layers(recipe, model)),
            _heading("Parameters", _parameters(model)),
            _heading("Decoding state (batch 1)", _cache(recipe, model)),
            _heading("Memory of distillation, per device", _memory(recipe, model)),
        ]
    samples, turns = count_samples(recipe.data)
    parts.append(_heading("Updates", _updates(recipe, samples)))
    parts.append(_heading("Teacher targets", _targets(recipe.targets, vocabulary, turns)))
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


@torch.inference_mode()
def kv_bytes(model: Any) -> list[int]:
    """Bytes that each decoder layer caches per token, from what it puts into a cache; runs on ``meta`` too."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with model.device:
        model.get_decoder()(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return [tensor_bytes(vars(layer)) for layer in cache.layers]


@torch.inference_mode()
def state_bytes(mixer: Mamba2Mixer) -> int:
    """Bytes of the state of one sequence, whatever its length.

    Measured on a mixer that differs in its hidden size of 1 only, on which the state does not depend.
    """
    dtype = mixer.in_proj.weight.dtype
    options = dataclasses.replace(mixer.options, hidden_size=1, rotary=False)
    cache = DynamicCache()
    Mamba2Mixer(options, layer_idx=0, kernels="torch").to(dtype)(torch.zeros(1, 1, 1, dtype=dtype), None, cache)
    return cache_bytes(cache)


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
    teacher_parameters, teacher_kv = _count(model.parameters()), kv_bytes(model)
    layers = choose_layers(len(teacher_kv), wanted.ratio, wanted.layers)
    originals = init.convert_(model, layers, wanted.init, recipe.seed, wanted.chunk_size, wanted.kernels)
    trained = hybrid.trained_parameters(model, recipe.distill.train_connector)
    return _Model(model, originals, trained, teacher_parameters, teacher_kv)


def _layers(recipe: Recipe, model: _Model) -> str:
    total = len(model.teacher_kv)
    replaced = sorted(model.originals)
    return (
        f"{len(replaced)} of {total} decoder layers become Mamba-2 ({len(replaced) / total:.1%}): "
        f"{', '.join(map(str, replaced))}\n"
        f"start: {recipe.hybrid.init}" + "".join(f"; also distilled: {name}" for name in recipe.hybrid.compare_inits)
    )


def _parameters(model: _Model) -> str:
    trained = {id(parameter) for parameter in model.trained.values()}
    rows = [["", "total", "trained", "frozen"]]
    for name, parameters in [*_parts(model.hybrid), ("hybrid", list(model.hybrid.parameters()))]:
        total = _count(parameters)
        learnt = _count(p for p in parameters if id(p) in trained)
        rows.append([name, f"{total:,}", f"{learnt:,}", f"{total - learnt:,}"])
    rows.append(["teacher", f"{model.teacher_parameters:,}", "", f"{model.teacher_parameters:,}"])
    return table(rows)


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


def _cache(recipe: Recipe, model: _Model) -> str:
    contexts = recipe.profile.contexts
    rows = [["", "per token", "per sequence", *(f"{context:,} tokens" for context in contexts)]]
    kept = sum(size for number, size in enumerate(model.teacher_kv) if number not in model.originals)
    states = sum(map(state_bytes, hybrid.mixers(model.hybrid).values()))
    for name, cost in (("teacher", CacheCost(sum(model.teacher_kv), 0)), ("hybrid", CacheCost(kept, states))):
        sizes = (cost.per_token, cost.per_sequence, *(cost.at(context) for context in contexts))
        rows.append([name, *map(_size, sizes)])
    return table(rows)


def _memory(recipe: Recipe, model: _Model) -> str:
    """ZeRO stage 1 splits the optimiser over the GPUs, stage 2 the gradients too."""
    distill, gpus = recipe.distill, recipe.resources.gpu
    sharded = distill.engine == "deepspeed" or (distill.engine == "auto" and gpus > 0)
    stage, devices = (distill.deepspeed.zero_stage, max(gpus, 1)) if sharded else (0, 1)
    weights = list(model.hybrid.parameters()) + [p for module in model.originals.values() for p in module.parameters()]
    value_bytes = max(p.element_size() for p in model.hybrid.parameters())
    master = MASTER_BYTES if value_bytes < MASTER_BYTES else 0
    trained = _count(model.trained.values())
    activation_bytes = 2 if distill.autocast == "bfloat16" else value_bytes
    tokens = distill.micro_batch_size * recipe.data.max_length
    per_token = saved_bytes_per_token(model.config, len(model.originals), activation_bytes)
    sizes = {
        "weights, replaced attention included": sum(map(_bytes, weights)),
        "gradients": trained * GRADIENT_BYTES // (devices if stage >= 2 else 1),
        "optimiser": trained * (ADAM_BYTES + master) // devices,
        f"activations, {distill.micro_batch_size} x {recipe.data.max_length} tokens at most": tokens * per_token,
    }
    rows = [[name, f"about {_size(size)}"] for name, size in [*sizes.items(), ("sum", sum(sizes.values()))]]
    split = f"ZeRO stage {stage} over {devices} GPUs" if sharded else "one device, no sharding"
    return f"{table(rows)}\n{split}; logits, buffers and the framework itself come on top"


def _updates(recipe: Recipe, samples: int | None) -> str:
    distill = recipe.distill
    limit = distill.max_updates
    if samples is None:
        bound = f"; at most {limit:,} (distill.max_updates)" if limit else ""
        return f"unknown until data is prepared: one per {distill.batch_size} samples{bound}"
    per_epoch = math.ceil(samples / distill.batch_size)
    total = min(per_epoch * distill.epochs, limit or per_epoch * distill.epochs)
    schedule = recipe.distill.schedule
    stable = total - schedule.warmup_updates - schedule.decay_updates
    about = "about " if recipe.data.max_samples else ""
    text = (
        f"{about}{samples:,} samples / {distill.batch_size} = {per_epoch:,} an epoch, {total:,} in all: "
        f"{schedule.warmup_updates:,} warm-up, {max(stable, 0):,} stable, {schedule.decay_updates:,} decay"
    )
    return text if stable >= 0 else f"{text}\nwarning: warm-up and decay are longer than the run"


def _targets(settings: Targets, vocabulary: int | None, turns: int | None) -> str:
    id_bytes = 4 if vocabulary is None or vocabulary > 2**16 else 2
    per_token = settings.top_k * (id_bytes + 2) + 2
    text = f"{per_token} B per answer token (top {settings.top_k} and one tail bucket), {settings.shards} shards"
    if turns is None:
        return f"{text}; total unknown until data is prepared"
    return f"{text}: about {_size(turns * ANSWER_TOKENS * per_token)} for {turns:,} answers of {ANSWER_TOKENS} tokens"


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(count: float) -> str:
    """A number of bytes with its unit, in powers of 1024."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(int(math.log2(max(count, 1))) // 10, len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def table(rows: list[list[str]]) -> str:
    """``rows`` as text in columns, the first to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _heading(title: str, text: str) -> str:
    indented = "\n".join(f"  {line}" for line in text.splitlines())
    return f"{title}\n{indented}"
