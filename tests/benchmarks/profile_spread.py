"""Whether a profile repeats: ``python tests/benchmarks/profile_spread.py [RUNS]``.

Runs the profile of the default recipe, of its teacher and the hybrid that it starts from, several times, each in a
process of its own, and counts how many medians of a run lie between the lowest and highest value that the run before
states: of all, and of the ratios between the models, which were measured in the same moments. Independent repeats of
one distribution would lie there in 83 % (5 repeats), 93 % (7) or 97 % (9) of all cases. The last line is a JSON object.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from matvlm.artifacts import Checkpoint, ProfileResult
from matvlm.init import convert_
from matvlm.models import hybrid, locate
from matvlm.models.layers import choose_layers
from matvlm.profiling import profile
from matvlm.recipes import load_recipe
from matvlm.reporting import Reporter

ROOT = Path(__file__).resolve().parents[2]
QUANTITIES = ("prefill_seconds", "first_token_seconds", "decode_tokens_per_second", "total_seconds")


def one_run(folder: Path) -> None:
    """Print the profile of teacher and student in ``folder`` as JSON, with the threads of the recipe's steps."""
    recipe = load_recipe(ROOT / "flows" / "recipes" / "easyvqa.yaml")
    torch.set_num_threads(recipe.resources.cpu)
    teacher = Checkpoint(uri=recipe.teacher.uri, label="teacher")
    started = time.monotonic()
    result = profile([teacher, Checkpoint(uri=str(folder), label="student")], recipe.profile, Reporter())
    print(json.dumps({"seconds": time.monotonic() - started, "result": result.model_dump(mode="json")}))


def inside(before: ProfileResult, after: ProfileResult) -> dict[str, list[bool]]:
    """By quantity, whether each point's median of ``after`` lies within the spread of ``before``."""
    found: dict[str, list[bool]] = {name: [] for name in QUANTITIES}
    for old, new in zip(before.points, after.points, strict=True):
        for name in QUANTITIES:
            stated = getattr(old.measured, name)
            found[name].append(stated.low <= getattr(new.measured, name).median <= stated.high)
    return found


def ratios(result: ProfileResult) -> list[list[float]]:
    """Of decoding speed, student to teacher, repeat by repeat, at each point of the student."""
    speed = {(p.label, p.stack, p.place): p.measured.decode_tokens_per_second.each for p in result.points if p.measured}
    return [
        [ours / theirs for ours, theirs in zip(each, speed["teacher", stack, place], strict=True)]
        for (label, stack, place), each in speed.items()
        if label == "student"
    ]


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(ROOT / "flows" / "recipes" / "easyvqa.yaml")
        model, processor = locate.load(recipe.teacher.uri)
        layers = choose_layers(len(hybrid.decoder_layers(model)), recipe.hybrid.ratio, "even")
        convert_(model, layers, recipe.hybrid.init, recipe.seed)
        hybrid.save(model, processor, Path(name) / "student", {})
        command = [sys.executable, __file__, "--one", str(Path(name) / "student")]
        printed = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
            for _ in range(runs)
        ]
    results = [ProfileResult.model_validate(each["result"]) for each in printed]
    pairs = [inside(before, after) for before, after in pairwise(results)]
    compared = [
        min(stated) <= statistics.median(again) <= max(stated)
        for before, after in pairwise(results)
        for stated, again in zip(ratios(before), ratios(after), strict=True)
    ]
    share = {name: statistics.mean(hit for pair in pairs for hit in pair[name]) for name in QUANTITIES}
    summary = {
        "seconds": [round(each["seconds"], 1) for each in printed],
        "repeats": results[0].repeats,
        "inside": {name: round(value, 3) for name, value in share.items()},
        "inside_all": round(statistics.mean(share.values()), 3),
        "layer_ratios_inside": round(statistics.mean(compared), 3),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_run(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
