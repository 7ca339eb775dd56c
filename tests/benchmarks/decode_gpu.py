"""How fast does the engine decode at the paper's scale on a GPU, and how near is that to what the memory allows?

    python tests/benchmarks/decode_gpu.py                          # a CUDA machine with mamba-ssm and causal-conv1d
    python tests/benchmarks/decode_gpu.py --parts compare lengths
    python tests/benchmarks/decode_gpu.py --tiny --device cpu      # a rehearsal of the script

The architecture is TinyLLaVA-Phi-2-SigLIP-3.1B with random bfloat16 weights: the teacher, and hybrids with 25 % and
50 % of its layers Mamba-2. What is measured, and how, is said in ``matvlm.profiling``. The parts:

- compare: batch 1 at about 1k tokens, the engine beside transformers' ``generate()`` with dynamic and static cache
- lengths: batch 1 at 1k, 4k, 16k, 32k and 64k tokens (also how long their prompts take)
- batches: 8 and 32 sequences of 4k tokens
- long: 16k tokens generated, and the last 4k of 64k, for the memory
- columns: the attention kernel alone, by how many columns apart the heads of its cache lie
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hybrid_gpu import build_teacher
from kernels_gpu import milliseconds

from matvlm.config import Profile
from matvlm.init import convert_
from matvlm.models.layers import choose_layers
from matvlm.profiling import profile_models
from matvlm.report import profile_table
from matvlm.reporting import Reporter

PARTS: dict[str, list[dict[str, Any]]] = {
    "compare": [{"prompts": [960], "new_tokens": [128], "repeats": 3}],
    "lengths": [{"stacks": ["engine"], "prompts": [960, 4032, 16320, 32704, 65472], "new_tokens": [128], "repeats": 3}],
    "batches": [{"stacks": ["engine"], "prompts": [4032], "new_tokens": [128], "batch_sizes": [8, 32], "repeats": 3}],
    "long": [
        {"stacks": ["engine"], "prompts": [769], "new_tokens": [16384], "repeats": 1},
        {"stacks": ["engine"], "prompts": [61440], "new_tokens": [4096], "repeats": 1},
    ],
}
TINY = {"prompts": [24, 48], "new_tokens": [8], "repeats": 2, "stacks": ["engine", "hf"]}


FILLED = [(1, 65408), (8, 3968), (32, 3968)]
"""Sequences and tokens of each, for the part ``columns``."""
BEYOND = [128, 192, 256, 384]
"""Columns of the cache that hold no token; with the first they are a multiple of 1,024."""
TURNS = 16
"""Launches over four layers, so that none of them finds its keys in a cache of the GPU."""


def columns_table() -> str:
    """GB/s at which the kernel reads keys and values."""
    lines = [" batch  filled" + "".join(f"{beyond:>7} more" for beyond in BEYOND)]
    for batch, filled in FILLED:
        speeds = (read_speed(batch, filled, filled + beyond) for beyond in BEYOND)
        lines.append(f"{batch:>6}{filled:>8,}" + "".join(f"{speed:>12,.0f}" for speed in speeds))
    return "\n".join(lines)


def read_speed(batch: int, filled: int, columns: int, heads: int = 32, width: int = 80) -> float:
    from matvlm.kernels.decode.attention import Scratch, decode

    device, dtype = torch.device("cuda"), torch.bfloat16
    qkv = torch.randn(batch, 3 * heads * width, dtype=dtype, device=device)
    keys, values = torch.zeros(2, 4, batch, heads, columns, width, dtype=dtype, device=device)
    out, first = torch.empty_like(qkv[:, : heads * width]), torch.zeros(batch, dtype=torch.long, device=device)
    end, scratch = torch.full((1,), filled, device=device), Scratch(batch, heads, heads, width, device)

    def launch() -> None:
        for turn in range(TURNS):
            decode(qkv, keys[turn % 4], values[turn % 4], first, end, width**-0.5, out, scratch)

    read = TURNS * batch * filled * heads * width * 2 * keys.element_size()
    return read / milliseconds(launch) / 1e6


def models(tiny: bool, device: str, ratios: list[float]) -> Iterator[tuple[str, PreTrainedModel]]:
    """The teacher, then a hybrid for each ratio, all in bfloat16."""
    teacher = build_teacher(tiny, device)
    yield "teacher", teacher
    for ratio in ratios:
        hybrid: Any = copy.deepcopy(teacher)
        convert_(hybrid, choose_layers(hybrid.config.text_config.num_hidden_layers, ratio), "aligned")
        yield f"{ratio:.0%}", hybrid.bfloat16().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=[*PARTS, "columns"])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.25, 0.5])
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if "columns" in options.parts:
        print(f"## columns: GB/s\n\n{columns_table()}", flush=True)
    built = list(models(options.tiny, options.device, options.ratios))
    for part in [part for part in options.parts if part in PARTS]:
        for values in PARTS[part] if not options.tiny else [TINY]:
            result = profile_models(built, Profile(**values), Reporter())
            print(f"\n## {part}\n\n{'; '.join(f'{name}: {value}' for name, value in result.machine.items())}")
            print(f"\n{profile_table(result)}", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
