"""How fast are teacher targets at the paper's scale, from image files to a verified store? Random weights.

    python tests/benchmarks/targets_gpu.py                             # a CUDA machine
    python tests/benchmarks/targets_gpu.py --processes 2               # one for each of two GPUs
    python tests/benchmarks/targets_gpu.py --tiny --device cpu --samples 64 --workers 2   # a rehearsal of the script

The architecture is TinyLLaVA-Phi-2-SigLIP-3.1B. A sample is a JPEG file of 640 x 480 pixels (a smooth gradient with
some shapes, no noise, quality 90; so it is decoded faster than most photographs), a question and an answer of about 100
words, of which a word-level tokenizer makes a token each: 728 image tokens and about 900 in all, lengths spread over
+- 5 %. They are prepared as any data in LLaVA's format. What is timed is ``ShardMaker.make`` of all shards: starting
the workers, reading, decoding, scaling, tokenising, the teacher, its targets, and files that are synced to disk.
Loading the model and its fingerprint come before; joining the shards, which verifies them, comes after and is timed for
itself.

A row is the median of several stores, after a shard that is not timed (it compiles). Shares are those of the device's
time, of the first process: waiting for samples, the teacher without its head, head and targets, waiting for files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from hybrid_gpu import build_teacher
from PIL import Image, ImageDraw
from transformers import LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from matvlm.artifacts import DataManifest
from matvlm.config import Recipe
from matvlm.data.prepare import prepare
from matvlm.models.small import CHAT_TEMPLATE, IMAGE, build_tokenizer
from matvlm.reporting import Reporter
from matvlm.targets import TargetJob, join_shards, open_targets
from matvlm.world import LONGEST_WAIT, World, join

WORDS = [f"w{number}" for number in range(1000)]
ANSWER, IMAGES = 100, 256
SHARES = ("data", "teacher", "top_k", "write")


class Shares(Reporter):
    """Keeps what the time went into."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.seen = {name.removeprefix("targets/share_"): value for name, value in values.items()}


def build(options: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """The teacher and a processor for it that no hub is needed for."""
    model = build_teacher(options.tiny, device)
    vision = model.config.vision_config
    tokenizer = build_tokenizer([" ".join(WORDS)])
    model.config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    side = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )
    return model, processor


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    corners = torch.rand(1, 3, 2, 2, generator=generator)
    smooth = torch.nn.functional.interpolate(corners, (480, 640), mode="bilinear", align_corners=True)[0]
    image = Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(image)
    for left, top, width, height, *color in torch.rand(12, 7, generator=generator).tolist():
        box = (left * 560, top * 400, left * 560 + 20 + width * 200, top * 400 + 20 + height * 150)
        draw.ellipse(box, fill=tuple(int(256 * value) for value in color))
    return image


def write_data(folder: Path, samples: int, image_tokens: int, tokens: int) -> None:
    """``samples`` conversations about ``IMAGES`` pictures, as LLaVA's files have them."""
    folder.mkdir()
    for number in range(IMAGES):
        picture(number).save(folder / f"{number}.jpg", quality=90)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(samples, generator=generator).tolist()
    talk = []
    for number in range(samples):
        length = int(tokens * (0.95 + 0.1 * order[number] / max(1, samples - 1)))
        answer = min(ANSWER, (length - image_tokens) // 2)
        count = length - image_tokens - 4  # two speakers, the end mark, and what the answer begins with
        words = [WORDS[place] for place in torch.randint(0, len(WORDS), (count,), generator=generator).tolist()]
        texts = [("human", "<image>\n" + " ".join(words[answer:])), ("gpt", " ".join(words[:answer]))]
        turns = [{"from": who, "value": text} for who, text in texts]
        talk.append({"id": str(number), "image": f"{number % IMAGES}.jpg", "conversations": turns})
    (folder / "talk.json").write_text(json.dumps(talk))


def recipe(folder: Path, batch: int, workers: int, compiled: bool, options: argparse.Namespace) -> Recipe:
    targets = {"positions": options.positions, "scheme": options.scheme, "top_k": options.top_k}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "teacher": {"dtype": "bfloat16"},
            "data": {"source": "llava", "path": str(folder / "images" / "talk.json"), "max_length": 2048},
            "targets": {
                **targets,
                "shards": options.shards * options.processes,
                "batch_size": batch,
                "workers": workers,
                "compile": compiled,
            },
            "distill": {"autocast": "bfloat16"},
        }
    )


def prepared(options: argparse.Namespace, folder: Path, model: Any) -> DataManifest:
    vision = model.config.vision_config
    image_tokens = (vision.image_size // vision.patch_size) ** 2 - 1
    write_data(folder / "images", options.samples, image_tokens, 200 if options.tiny else options.tokens)
    return prepare(recipe(folder, 1, 0, False, options).data, 0, folder / "data")


def measure(job: TargetJob, folder: Path, options: argparse.Namespace, world: World) -> list[str]:
    """The figures of a row; the stores are removed again."""
    mine = list(range(job.settings.shards))[world.rank :: world.size]
    replace(job.maker, uri=str(folder / f"warm-up-{world.rank}")).make(mine[:1])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for repeat in range(options.repeats):
        uri, shares = str(folder / f"store-{repeat}"), Shares()
        world.wait()
        started = time.perf_counter()
        replace(job.maker, uri=uri).make(mine, shares)
        seconds = max(world.gather(time.perf_counter() - started))
        runs.append((options.samples / seconds, shares.seen))
    rates = sorted(rate for rate, _ in runs)
    rate = statistics.median(rates)
    seen = min(runs, key=lambda run: abs(run[0] - rate))[1]
    started = time.perf_counter()
    store = world.from_first(lambda: join_shards(uri, job.settings.shards, job.identity))
    joined = time.perf_counter() - started
    assert len(open_targets(uri, job.identity)) == store.num_samples == options.samples
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    world.wait()
    if world.is_first:
        for path in [*folder.glob("warm-up-*"), *folder.glob("store-*")]:
            shutil.rmtree(path)
    return [
        f"{rate:.1f} ({rates[0]:.1f} - {rates[-1]:.1f})",
        f"{rate / world.size:.1f}",
        *(f"{seen[share]:.1%}" for share in SHARES),
        f"{joined:.1f}",
        f"{store.num_positions / store.num_samples:.0f}",
        f"{store.bytes_per_position:.1f}",
        f"{peak:.1f}",
    ]


def machine(options: argparse.Namespace) -> str:
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    return (
        f"{options.processes} x {gpu}, {os.cpu_count()} CPU cores ({platform.machine()}); Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{options.samples} samples, {options.shards} shards a process, positions {options.positions}, "
        f"{options.scheme} {options.top_k}; median (lowest - highest) of {options.repeats}\n"
    )


def work(options: argparse.Namespace, folder: Path) -> None:
    """One process's part; the first one prints."""
    world, device = join(options.device, LONGEST_WAIT)
    model, processor = build(options, device)
    data = world.from_first(lambda: prepared(options, folder, model))
    heads = ["batch", "workers", "compile", "samples/s", "a process", *(f"{share} %" for share in SHARES)]
    heads += ["join s", "positions a sample", "bytes a position", "peak GiB"]
    if world.is_first:
        print(machine(options))
        print(f"| {' | '.join(heads)} |\n|{'--:|' * len(heads)}", flush=True)
    for compiled, batch, workers in itertools.product(options.compile, options.batch, options.workers):
        job = TargetJob(
            recipe(folder, batch, workers, compiled == "on", options), model, processor, data, str(folder / "store")
        )
        figures = measure(job, folder, options, world)
        if world.is_first:
            print(f"| {batch} | {workers} | {compiled} | {' | '.join(figures)} |", flush=True)
    world.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--workers", type=int, nargs="+", default=[6])
    what = "off comes first, as a compiled model stays so"
    parser.add_argument("--compile", nargs="+", default=["off", "on"], choices=["off", "on"], help=what)
    parser.add_argument("--positions", default="answer", choices=["answer", "text", "all"])
    parser.add_argument("--scheme", default="topk_tail", choices=["topk_tail", "topk_sampled"])
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--shards", type=int, default=2, help="for each process")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        work(options, options.folder)
        return
    with TemporaryDirectory() as folder:
        if options.processes == 1:
            work(options, Path(folder))
            return
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
        command = [sys.executable, *torchrun, *sys.argv, "--folder", folder]
        sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
