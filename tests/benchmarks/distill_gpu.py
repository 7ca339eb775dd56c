"""How fast is distillation at the paper's scale, and how fast the reference procedure? Random weights.

    python tests/benchmarks/distill_gpu.py               # a CUDA machine with mamba-ssm and causal-conv1d
    python tests/benchmarks/distill_gpu.py --tiny --device cpu --kernels torch   # a rehearsal of the script

The architecture is TinyLLaVA-Phi-2-SigLIP-3.1B with 25 % of its layers Mamba-2, batches of 64 samples of an image and
about 900 tokens in all. The reference procedure (arXiv 2503.13440) is written here as its code runs it: two copies of
the whole model, every layer of the student run on the teacher's hidden states, gradient checkpointing, the divergence
over all positions at once; it is given the image features, so it has no vision tower, and no ZeRO. Ours is
``Run.update``, vision tower and optimiser included. A row is the median of several updates, after warm-up.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from hybrid_gpu import IMAGE_TOKEN, build_teacher
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matvlm.config import Recipe
from matvlm.data.encoding import IGNORE, Batch
from matvlm.distill.feed import GROUP, Group, Share
from matvlm.distill.run import Run
from matvlm.distill.speed import PHASES
from matvlm.init import convert_
from matvlm.models.hybrid import mixers
from matvlm.models.layers import choose_layers

TOP_K, ANSWER = 32, 100


class Drawn:
    """A target store's reader whose targets are random, but always the same for a sample; made in no time."""

    def lookup(self, ids: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        token_ids = torch.arange(TOP_K).repeat(len(ids) * ANSWER, 1)
        generators = (torch.Generator().manual_seed(int(id)) for id in ids)
        logits = torch.cat([torch.randn(ANSWER, TOP_K + 1, generator=generator) for generator in generators])
        logprobs = logits.log_softmax(-1)
        return token_ids, logprobs[:, :-1], logprobs[:, -1]

    def draws(self, ids: Sequence[str]) -> None:
        return None


def samples(model: Any, count: int, tokens: int, seed: int = 0) -> list[dict[str, Any]]:
    """An image, a question and an answer each; lengths spread evenly over +- 5 % of ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    image_tokens = (vision.image_size // vision.patch_size) ** 2 - 1
    made = []
    for number in range(count):
        length = int(tokens * (0.95 + 0.1 * number / max(1, count - 1)))
        ids = torch.randint(0, 50000, (length,), generator=generator)
        ids[20 : 20 + image_tokens] = IMAGE_TOKEN
        labels = torch.full_like(ids, IGNORE)
        labels[-ANSWER:] = ids[-ANSWER:]
        pixels = torch.randn(3, vision.image_size, vision.image_size, generator=generator)
        made.append({"id": str(number), "input_ids": ids, "labels": labels, "pixel_values": pixels})
    order = torch.randperm(count, generator=generator).tolist()
    return [made[place] for place in order]


def collate(chosen: list[dict[str, Any]]) -> Batch:
    pad = nn.utils.rnn.pad_sequence
    ids = pad([sample["input_ids"] for sample in chosen], batch_first=True)
    labels = pad([sample["labels"] for sample in chosen], batch_first=True, padding_value=IGNORE)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in chosen])
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    pixels = torch.stack([sample["pixel_values"] for sample in chosen])
    return Batch(
        [sample["id"] for sample in chosen], {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, labels
    )


def groups(data: list[dict[str, Any]], size: int, device: str, at_once: int = GROUP) -> Iterator[Group]:
    """``data`` as ``Feed`` hands it out."""

    def batch(first: int, count: int) -> Batch:
        made = collate(data[first : first + count])
        return made.pinned() if device != "cpu" else made

    several = size * max(1, at_once // size)
    for first in range(0, len(data), several):
        parts = [batch(start, size) for start in range(first, min(first + several, len(data)), size)]
        yield Group(parts[0] if several == size else batch(first, several), parts)


class Reference:
    """The published procedure, in a few lines and without its data pipeline."""

    def __init__(self, teacher: Any, student: Any, kernels: str):
        self.teacher, self.student = teacher.requires_grad_(False), student.requires_grad_(False).train()
        trained = [p for mixer in mixers(student).values() for p in mixer.requires_grad_().parameters()]
        for mixer in mixers(student).values():
            mixer.kernels = kernels
        self.decoder, self.wanted = student.model.language_model, teacher.model.language_model
        self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(trained, lr=2e-4, betas=(0.9, 0.95), fused=trained[0].is_cuda)
        self.trained = trained

    def update(self, batches: list[Batch], features: Tensor) -> None:
        for batch in batches:
            self._backward(batch, features[: len(batch.ids)], len(batches))
        nn.utils.clip_grad_norm_(self.trained, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self, batch: Batch, features: Tensor, count: int) -> None:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        embedded = self.decoder.embed_tokens(ids)
        embedded = embedded.masked_scatter((ids == IMAGE_TOKEN)[..., None], features.to(embedded.dtype))
        embedded.requires_grad_()  # the reference trains the connector
        with torch.no_grad():
            shown = self.wanted(inputs_embeds=embedded, attention_mask=mask, output_hidden_states=True, use_cache=False)
            expected = self.teacher.lm_head(shown.last_hidden_state)
        layer_loss = self._layer_loss(shown.hidden_states, mask)
        hidden = self.decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        logits = self.student.lm_head(hidden)
        log_p, log_q = expected.float().log_softmax(-1), logits.float().log_softmax(-1)
        divergence = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        ((divergence + layer_loss) / count).backward()

    def _layer_loss(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Every layer on the teacher's hidden state, of which only the replaced ones have anything to learn."""
        positions = torch.arange(states[0].shape[1], device=mask.device)[None]
        rotary = self.decoder.rotary_emb(states[0], positions)
        total = torch.zeros((), device=mask.device)
        for layer, given, wanted in zip(self.decoder.layers, states[:-1], states[1:], strict=True):
            output = layer(given, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(layer.self_attn, type(next(iter(mixers(self.student).values())))):
                total = total + nn.functional.mse_loss(output.float(), wanted.float())
        return total


class Way(NamedTuple):
    """How to compute the same."""

    checkpointing: str
    compile: str
    graphs: str

    def __str__(self) -> str:
        return f"checkpointing {self.checkpointing}, compile {self.compile}, graphs {self.graphs}"


def recipe(size: int, layer_inputs: str, targets: str, way: Way, options: argparse.Namespace) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "teacher": {"dtype": "bfloat16"},
            "hybrid": {"kernels": options.kernels},
            "distill": {
                "engine": options.engine,
                "batch_size": options.batch,
                "micro_batch_size": size,
                "autocast": "bfloat16",
                "activation_checkpointing": way.checkpointing,
                "compile": way.compile == "on",
                "cuda_graphs": way.graphs == "on",
                "loss": {"layer_inputs": layer_inputs, "targets": targets},
            },
        }
    )


class Measured(NamedTuple):
    seconds: float
    """Median of an update."""
    peak: float
    """Of allocated memory, GiB, graphs' own apart; what stays allocated between updates; and the peak of what is
    reserved, which is with graphs' own, and with what the allocator keeps at hand."""
    fixed: float
    reserved: float


def timed(step: Callable[[], Any], repeats: int, device: str) -> Measured:
    """``repeats`` calls, after one more."""
    step()
    cuda = device != "cpu"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    kinds = (torch.cuda.max_memory_allocated, torch.cuda.memory_allocated, torch.cuda.max_memory_reserved)
    return Measured(statistics.median(times), *(kind() / 2**30 if cuda else 0.0 for kind in kinds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", default="mamba_ssm", choices=["mamba_ssm", "torch"])
    parser.add_argument("--engine", default="torch", choices=["torch", "deepspeed"])
    parser.add_argument("--init", default="aligned", choices=["aligned", "paper"])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--checkpointing", nargs="+", default=["mixers"])
    parser.add_argument("--compile", nargs="+", default=["on"], choices=["on", "off"])
    parser.add_argument("--graphs", nargs="+", default=["off"], choices=["on", "off"])
    parser.add_argument("--losses", nargs="+", default=["teacher_forced/cached", "student_forced/cached"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64, help="samples an update")
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--skip-reference", action="store_true")
    parser.add_argument("--trace", type=Path, help="a folder for tables of the slowest kernels of one micro-batch")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    tokens = 200 if options.tiny else options.tokens
    device = options.device
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else device}; torch {torch.__version__}, transformers "
          f"{transformers.__version__}; kernels {options.kernels}, engine {options.engine}, init {options.init}; "
          f"{options.batch} samples an update, {tokens} tokens +- 5 %; median of {options.repeats}\n")  # fmt: skip
    heads = [
        "procedure",
        "micro-batch",
        "samples/s",
        "ms a sample",
        "peak GiB",
        "between updates",
        "reserved",
        "MFU",
        *PHASES,
    ]
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}", flush=True)
    teacher = build_teacher(options.tiny, device)
    data = samples(teacher, options.batch, tokens)
    cut = {size: list(groups(data, size, device)) for size in options.micro_batches}

    def row(name: str, size: int, found: Measured, rates: dict[str, float]) -> None:
        spent = [f"{rates[f'share_{phase}']:.0%}" if rates else "" for phase in PHASES]
        mfu = f"{rates['mfu']:.0%}" if "mfu" in rates else ""
        figures = [f"{options.batch / found.seconds:.1f}", f"{found.seconds / options.batch * 1e3:.1f}"]
        figures += [f"{found.peak:.1f}", f"{found.fixed:.1f}", f"{found.reserved:.1f}", mfu]
        print(f"| {name} | {size} | {' | '.join([*figures, *spent])} |", flush=True)

    ways = itertools.starmap(Way, itertools.product(options.checkpointing, options.compile, options.graphs))
    for (losses, way), (size, made) in itertools.product(itertools.product(options.losses, ways), cut.items()):
        layer_inputs, targets = losses.split("/")
        settings = recipe(size, layer_inputs, targets, way, options)
        name = f"{layer_inputs}, {targets}, {way}"
        traced = options.trace and options.trace / f"{name} {size}.txt".replace(", ", "-").replace(" ", "-")
        started = time.perf_counter()
        row(f"ours, {name}", size, *ours(teacher, settings, made, options, traced))
        print(f"that took {time.perf_counter() - started:.0f} s, compiling included", file=sys.stderr)
    if not options.skip_reference:
        student = copy.deepcopy(teacher)
        layers = choose_layers(teacher.config.text_config.num_hidden_layers, 0.25)
        convert_(student, layers, "paper", chunk_size=256)
        student.bfloat16()
        for model in (teacher, student):
            model.model.vision_tower.to("cpu")
        reference = Reference(teacher, student, options.kernels)
        width = teacher.config.text_config.hidden_size
        for size, made in cut.items():
            there = [part.to(device) for group in made for part in group.parts]
            count = int((there[0].inputs["input_ids"][0] == IMAGE_TOKEN).sum())
            features = torch.randn(size, count, width, device=device, dtype=torch.bfloat16)
            found = timed(lambda there=there, features=features: reference.update(there, features),
                          options.repeats, device)  # fmt: skip
            row("reference procedure", size, found, {})


def ours(
    teacher: Any, settings: Recipe, groups: list[Group], options: argparse.Namespace, traced: Path | None
) -> tuple[Measured, dict[str, float]]:
    """An update of ours, and what its time goes into."""
    student, original = copy.deepcopy(teacher), copy.deepcopy(teacher)
    convert_(student, choose_layers(teacher.config.text_config.num_hidden_layers, 0.25), options.init, chunk_size=256)
    store: Any = Drawn()
    run = Run(settings, options.device, student, original, store)
    del original
    gc.collect()
    numbers = iter(range(1, 1000))

    def step() -> None:
        run.update(next(numbers), 1000, Share(groups, len(groups), {}))

    step()
    if traced:
        trace(lambda: run.update(next(numbers), 1000, Share(groups[:1], 1, {})), traced, options.device)
    run.speed.rates()
    found = timed(step, options.repeats, options.device)
    # ``teacher`` itself is there for the next row; no run needs it.
    spare = sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**30
    found = found._replace(**{kind: getattr(found, kind) - spare for kind in ("peak", "fixed", "reserved")})
    return found, run.speed.rates()


def trace(step: Callable[[], Any], path: Path, device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as profiler:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table)


if __name__ == "__main__":
    main()
