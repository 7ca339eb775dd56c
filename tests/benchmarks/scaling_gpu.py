"""How does distillation scale over the GPUs of one machine? Random weights, at the paper's scale.

    python tests/benchmarks/scaling_gpu.py --gpus 1 2      # CUDA GPUs, mamba-ssm, causal-conv1d and deepspeed
    python tests/benchmarks/scaling_gpu.py --tiny --device cpu --kernels torch --batch 8 --compile off   # a rehearsal

The model, the data and an update are those of ``distill_gpu.py``: teacher_forced, cached targets, checkpointing mixers.
Weak scaling gives every GPU ``--batch`` samples an update, strong scaling all of them together. "of linear" is the rate
against that of the first number of GPUs, one, in the same run, times how many more there are. "NCCL" is the time in
which a GPU runs a kernel of NCCL, as a share of an update: traced in one update more; in part it runs beside other
kernels, and in part it waits for another GPU. Losses are of the first updates; with strong scaling those of all numbers
of GPUs are of the same samples.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from distill_gpu import Drawn, Way, groups, recipe, samples, timed
from hybrid_gpu import build_teacher

from matvlm.config import Recipe
from matvlm.distill.feed import GROUP, Share
from matvlm.distill.run import Run
from matvlm.distill.speed import PHASES
from matvlm.init import convert_
from matvlm.models.layers import choose_layers
from matvlm.world import World, join

FIRST = 3
"""Updates whose losses are shown; they also warm up."""


def measure(options: argparse.Namespace, stage: int, scaling: str, world: World, device: str) -> dict[str, Any]:
    """What one process finds; all have to call it."""
    total = options.batch * (world.size if scaling == "weak" else 1)
    teacher = build_teacher(options.tiny, device)
    data = samples(teacher, total, 200 if options.tiny else options.tokens)[world.rank :: world.size]
    at_once = options.micro_batch if stage == 3 else GROUP
    made = list(groups(data, options.micro_batch, device, at_once))
    student = copy.deepcopy(teacher)
    convert_(student, choose_layers(teacher.config.text_config.num_hidden_layers, 0.25), "aligned", chunk_size=256)
    way = Way("mixers", "on" if options.compile == "on" and stage != 3 else "off", options.graphs)
    settings = recipe(options.micro_batch, "teacher_forced", "cached", way, options).model_dump()
    settings["distill"] |= {"deepspeed": {"zero_stage": stage}, "batch_size": total}
    store: Any = Drawn()
    run = Run(Recipe.model_validate(settings), device, student, teacher, store, world)
    del teacher
    numbers = iter(range(1, 1000))

    def step() -> dict[str, float]:
        return run.update(next(numbers), 1000, Share(made, len(made), {}))

    losses = [step()["loss"] for _ in range(FIRST)]
    run.speed.rates()
    world.wait()
    found = timed(step, options.repeats, device)
    rates = run.speed.rates()
    return {
        "stage": stage,
        "scaling": scaling if world.size > 1 else "",
        "gpus": world.size,
        "samples_per_second": total / max(world.gather(found.seconds)),
        "losses": losses,
        "nccl": communication(step) / found.seconds if device != "cpu" else 0.0,
        "peak": max(world.gather(found.peak)),
        "shares": {phase: rates[f"share_{phase}"] for phase in PHASES},
    }


def communication(step: Callable[[], Any]) -> float:
    """Seconds in kernels of NCCL in one update."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    torch.cuda.synchronize()
    return sum(row.self_device_time_total for row in profiler.key_averages() if "nccl" in row.key.lower()) / 1e6


def work(options: argparse.Namespace) -> None:
    """One process's part; the first one adds a line of JSON for each measurement."""
    world, device = join(options.device)
    scalings = options.scaling if world.size > 1 else options.scaling[:1]  # on one GPU they are the same
    for stage, scaling in itertools.product(options.stages, scalings):
        found = measure(options, stage, scaling, world, device)
        if world.is_first:
            with options.worker.open("a") as file:
                file.write(json.dumps(found) + "\n")
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    world.leave()


def show(found: dict[str, Any], base: dict[str, Any]) -> None:
    more = found["gpus"] / base["gpus"]
    cells = [f"ZeRO-{found['stage']}", found["scaling"], found["gpus"], f"{found['samples_per_second']:.1f}"]
    cells += [f"{found['samples_per_second'] / base['samples_per_second'] / more:.1%}", f"{found['nccl']:.1%}"]
    cells += [*(f"{found['shares'][phase]:.0%}" for phase in PHASES), f"{found['peak']:.1f}"]
    print(f"| {' | '.join(map(str, cells))} | {', '.join(f'{loss:.4f}' for loss in found['losses'])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="the first is what the others are held to")
    parser.add_argument("--stages", type=int, nargs="+", default=[2], choices=[1, 2, 3])
    parser.add_argument("--scaling", nargs="+", default=["weak", "strong"], choices=["weak", "strong"])
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument(
        "--compile", default="on", choices=["on", "off"], help="not with ZeRO-3, which knows no compiler"
    )
    parser.add_argument("--graphs", default="off", choices=["on", "off"])
    parser.add_argument("--kernels", default="mamba_ssm", choices=["mamba_ssm", "torch"])
    parser.add_argument("--engine", default="deepspeed", choices=["deepspeed", "torch"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}; engine {options.engine}, kernels "
        f"{options.kernels}; micro-batches of {options.micro_batch}, {options.batch} samples an update, "
        f"{options.tokens} tokens +- 5 %; compile {options.compile}, graphs {options.graphs}; median of "
        f"{options.repeats}\n"
    )
    heads = ["stage", "scaling", "GPUs", "samples/s", "of linear", "NCCL", *PHASES, "peak GiB a GPU", "losses"]
    print(f"| {' | '.join(heads)} |\n|---|---|{'--:|' * (len(heads) - 2)}", flush=True)
    bases: dict[int, dict[str, Any]] = {}
    # Each stage in processes of its own: ZeRO-3 leaves another ``linear`` behind in those that had it.
    for count, stage in itertools.product(options.gpus, options.stages):
        with TemporaryDirectory() as folder:
            lines = Path(folder) / "found.jsonl"
            started = time.perf_counter()
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [*launcher, __file__, *sys.argv[1:], "--stages", str(stage), "--worker", str(lines)]
            failed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "4"}).returncode
            for found in map(json.loads, lines.read_text().splitlines() if lines.exists() else []):
                show(found, bases.setdefault(found["stage"], found))
            print(f"{count}: {time.perf_counter() - started:.0f} s, exit {failed}", file=sys.stderr)


if __name__ == "__main__":
    main()
