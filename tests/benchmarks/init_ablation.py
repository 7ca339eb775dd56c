"""How fast each initialisation gets to the teacher: KL after 0, 20, 100, 500 alignment updates.

    python tests/benchmarks/init_ablation.py --model easyvqa
    python tests/benchmarks/init_ablation.py --model smollm2 --gguf FILE --device cuda --out smollm2.json

A quarter of the layers (``even``) of a teacher gets mixers by ``aligned``, ``paper`` and ``random``; they are aligned
(``matvlm.alignment``, all else frozen and untouched), and KL(teacher || hybrid) is taken on samples never aligned on.
First each initialisation gets the learning rate of a small grid with which its KL is lowest after 100 updates, one
seed, measured on samples of their own. A seed decides the random parts of an initialisation and the order of the data.
``aligned`` is calibrated on one batch (``matvlm.init.calibrate``), as a run does it; it is also measured without that,
and in the grid the others with it. An interrupted benchmark goes on from its ``--out`` file.

``easyvqa``: the shipped teacher, KL at answer positions. Samples are an image with two of its questions; the held-out
images are others than those aligned on. ``smollm2``: see ``smollm2.py``; blocks of 512 tokens, KL at all positions.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import transformers  # noqa: E402
from smollm2 import load_smollm2, perplexity, token_blocks  # noqa: E402

from matvlm.alignment import align  # noqa: E402
from matvlm.config import Data, Optimizer  # noqa: E402
from matvlm.data.encoding import Batch  # noqa: E402
from matvlm.init import CALIBRATED, INITS, calibrate  # noqa: E402
from matvlm.kernels import resolve_backend  # noqa: E402
from matvlm.models.hybrid import decoder_layers  # noqa: E402
from matvlm.models.layers import choose_layers  # noqa: E402
from matvlm.sensitivity import divergences  # noqa: E402

WITH, WITHOUT = ", calibrated", ", not calibrated"
"""End the name of an initialisation with ``calibrate`` where it does not belong, or without it where it does."""
REPORTED = ("aligned", "paper", "random", "aligned" + WITHOUT)
TRIED = (*REPORTED, "paper" + WITH, "random" + WITH)
"""What the table of learning rates shows."""
RATIO = 0.25

Name = tuple[str, int]
"""An initialisation and its seed."""


class Setting(NamedTuple):
    """A teacher with its data: ``batch(rows)`` of the rows ``train``, batches to choose by and batches to report."""

    model: Any
    batch: Callable[[list[int]], Batch]
    train: list[int]
    batch_size: int
    tuning: list[Batch]
    held_out: list[Batch]
    note: str

    def order(self, seed: int, updates: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """Inputs of ``updates`` batches; every row once before any comes again."""
        draw = random.Random(seed)
        rows: list[int] = []
        for _ in range(updates):
            if len(rows) < self.batch_size:
                rows = draw.sample(self.train, len(self.train))
            chosen, rows = rows[: self.batch_size], rows[self.batch_size :]
            yield self.batch(chosen).inputs


def easyvqa(arguments: argparse.Namespace) -> Setting:
    from PIL import Image

    from matvlm.data.encoding import Encoder, Turn
    from matvlm.data.sources import entries
    from matvlm.models import locate

    model, processor = locate.load("package://easyvqa-teacher", arguments.device, torch.float32)
    encoder = Encoder(processor, 256)
    images = entries(Data())
    random.Random(0).shuffle(images)
    samples = []
    for entry in images:
        row = entry()
        turns = [Turn(turn["question"], turn["answer"]) for turn in row["turns"]]
        pixels = Image.open(io.BytesIO(row["image"]["bytes"] or b"")).convert("RGB")
        pairs = [turns[start : start + 2] for start in range(0, len(turns), 2)]
        samples.append([(row["id"], pixels, pair) for pair in pairs])
    pairs_of = [pair for image in samples[512:] for pair in image]

    def collate(chosen: list[Any]) -> Batch:
        return encoder.collate([encoder.encode(*sample) for sample in chosen])

    tuning, held_out = (
        [collate(part[start : start + 64]) for start in range(0, len(part), 64)]
        for part in ([image[0] for image in samples[:256]], [image[0] for image in samples[256:512]])
    )
    return Setting(
        model,
        lambda rows: collate([pairs_of[row] for row in rows]),
        list(range(len(pairs_of))),
        32,
        tuning,
        held_out,
        f"package://easyvqa-teacher; {len(pairs_of)} samples of two questions, batch 32; 256 held-out samples, "
        f"{sum(int(batch.kept.sum()) for batch in held_out)} answer positions",
    )


def smollm2(arguments: argparse.Namespace) -> Setting:
    model, tokenizer = load_smollm2(Path(arguments.gguf), arguments.device)
    length, size = arguments.length, arguments.batch_size
    blocks, others = token_blocks(tokenizer, length)
    half = arguments.held_out // 2

    def text(chosen: torch.Tensor) -> Batch:
        return Batch([""] * len(chosen), {"input_ids": chosen}, labels=chosen)

    tuning = [text(part) for part in others[:half].split(size)]
    held_out = [text(part) for part in others[half : 3 * half].split(size)]
    return Setting(
        model,
        lambda rows: text(blocks[rows]),
        list(range(len(blocks))),
        size,
        tuning,
        held_out,
        f"SmolLM2-135M-Instruct (GGUF Q4_1, in float32), perplexity {perplexity(model, others[:half]):.2f} on {half} "
        f"held-out blocks; docstrings and pydoc topics, {len(blocks)} blocks of {length} tokens, batch {size}; "
        f"{2 * half} held-out blocks, all positions",
    )


def make(setting: Setting, layers: list[int], name: Name) -> dict[int, Any]:
    """The mixers of one initialisation and seed for ``layers``."""
    init, seed = name
    decoder = decoder_layers(setting.model)
    base = init.removesuffix(WITH).removesuffix(WITHOUT)
    make_mixer = INITS[base]
    mixers = {
        layer: make_mixer(decoder[layer].self_attn, layer, torch.Generator().manual_seed(1_000_003 * seed + layer))
        for layer in layers
    }
    if (base in CALIBRATED) != init.endswith((WITH, WITHOUT)):
        calibrate(setting.model, mixers, [setting.tuning[0].inputs])
    return mixers


def trial(
    setting: Setting, layers: list[int], inits: list[str], seed: int, rate: float, steps: list[int], test: list[Batch]
) -> dict[str, dict[int, float]]:
    """KL of each of ``inits`` after each of ``steps`` updates at learning rate ``rate``."""
    candidates = {init: make(setting, layers, (init, seed)) for init in inits}
    found: dict[str, dict[int, float]] = {init: {} for init in inits}

    def look(update: int) -> None:
        if update in steps:
            for init, value in divergences(setting.model, candidates, test).items():
                found[init][update] = value
            print(f"  seed {seed}, rate {rate:g}, update {update}: {found}", file=sys.stderr, flush=True)

    look(0)
    batches = setting.order(seed, max(steps))
    align(setting.model, candidates, batches, Optimizer(lr=rate, clip_grad_norm=1.0), on_update=look)
    return found


def table(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    steps = results["steps"]
    lines = [f"**{results['model']}**: {results['note']}. {results['machine']}", ""]
    lines += [f"| init | learning rate | {' | '.join(f'KL after {step}' for step in steps)} |"]
    lines += ["|---" * (2 + len(steps)) + "|"]
    for init, rate in results["rates"].items():
        cells = []
        for step in steps:
            values = [run[str(step)] for run in results["runs"][init].values()]
            cells.append(f"{statistics.mean(values):.2g} ({min(values):.2g} - {max(values):.2g})" if values else "")
        lines.append(f"| {init} | {rate:g} | {' | '.join(cells)} |")
    lines += ["", f"Learning rates, KL after {results['grid_updates']} updates on the tuning samples, seed 0:", ""]
    tried = [float(rate) for rate in next(iter(results["grid"].values()))]
    lines += [f"| init | {' | '.join(f'{rate:g}' for rate in tried)} |", "|---" * (1 + len(tried)) + "|"]
    for init, values in results["grid"].items():
        lines.append(f"| {init} | {' | '.join(f'{value:.2g}' for value in values.values())} |")
    return "\n".join(lines)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; float32 weights, matmul precision {torch.get_float32_matmul_precision()}, "
        f"kernels {resolve_backend('auto', torch.device(device))}"
    )


def run(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    setting = {"easyvqa": easyvqa, "smollm2": smollm2}[arguments.model](arguments)
    setting.model.requires_grad_(False)
    layers = choose_layers(len(decoder_layers(setting.model)), RATIO, "even")
    print(
        f"{setting.note}; layers {layers}; ready after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
    )
    out = Path(arguments.out)
    if out.exists():
        results = json.loads(out.read_text())
    else:
        results = {
            "model": arguments.model,
            "note": f"{setting.note}; layers {layers}",
            "machine": machine(arguments.device),
            "steps": arguments.steps,
            "grid_updates": arguments.grid_updates,
            "grid": {init: {} for init in TRIED},
            "runs": {init: {} for init in REPORTED},
            "seconds": 0,
        }

    def keep() -> None:
        nonlocal started
        results["seconds"] += round(time.monotonic() - started)
        started = time.monotonic()
        out.write_text(json.dumps(results, indent=2) + "\n")

    for rate in (rate for rate in arguments.rates if str(rate) not in results["grid"][TRIED[0]]):
        found = trial(setting, layers, list(TRIED), 0, rate, [arguments.grid_updates], setting.tuning)
        for init in TRIED:
            results["grid"][init][str(rate)] = found[init][arguments.grid_updates]
        keep()
    results["rates"] = {
        init: float(min(results["grid"][init], key=results["grid"][init].__getitem__)) for init in REPORTED
    }
    for seed in map(str, arguments.seeds):
        for rate in sorted(set(results["rates"].values())):
            left = [i for i in REPORTED if results["rates"][i] == rate and seed not in results["runs"][i]]
            if left:
                found = trial(setting, layers, left, int(seed), rate, arguments.steps, setting.held_out)
                for init in left:
                    results["runs"][init][seed] = {str(step): value for step, value in found[init].items()}
                keep()
    print(table(results))
    print(f"\n{results['seconds']} s in all.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("easyvqa", "smollm2"), required=True)
    parser.add_argument("--gguf", help="smollm2: the GGUF file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 100, 500])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates tried")
    parser.add_argument("--grid-updates", type=int, default=100)
    parser.add_argument("--length", type=int, default=512, help="smollm2: tokens of a block")
    parser.add_argument("--batch-size", type=int, default=8, help="smollm2: blocks of a batch")
    parser.add_argument("--held-out", type=int, default=64, help="smollm2: held-out blocks; half as many to tune")
    parser.add_argument("--out", default="init_ablation.json", help="written after each part, which is not done again")
    torch.set_float32_matmul_precision("high")
    run(parser.parse_args())
