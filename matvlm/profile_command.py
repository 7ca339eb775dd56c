"""The command ``profile``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from matvlm.config import PROTOCOLS, Profile, StackName
from matvlm.recipes import parse_recipe
from matvlm.reporting import Reporter
from matvlm.tracking import name_checkpoints


def register(add: Callable[..., argparse.ArgumentParser], checkpoints: str) -> None:
    """Add it to the command line; ``checkpoints`` says what a CHECKPOINT is."""
    defaults = Profile()
    command = add("profile", _profile, "measure speed and memory of checkpoints side by side", checkpoints)
    command.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="the first is what the others are held against"
    )
    what = "matvlm's engine, transformers' generate() with a dynamic or with a static cache; default: engine hf, on a "
    command.add_argument("--stacks", nargs="+", choices=get_args(StackName), help=what + "GPU all")
    what = "the published lengths and batch size; for these alone, leave out the three options below"
    command.add_argument("--protocol", choices=list(PROTOCOLS), help=what)
    for field, what in (
        ("prompts", "tokens that are there when decoding starts"),
        ("new_tokens", "tokens to decode for each sequence"),
        ("batch_sizes", "sequences at a time"),
    ):
        usual = " ".join(map(str, getattr(defaults, field)))
        option = "--" + field.replace("_", "-")
        command.add_argument(option, nargs="+", type=int, metavar="N", help=f"{what}; default: {usual}")
    command.add_argument("--repeats", type=int, metavar="N", help=f"default: {defaults.repeats}")
    what = "also write tables, plots and every figure (Markdown, PNG, CSV, JSON) into this folder"
    command.add_argument("--out", type=Path, metavar="DIR", help=what)


def _profile(options: argparse.Namespace) -> None:
    import torch

    from matvlm.inspection import table
    from matvlm.profiling import profile
    from matvlm.profiling.tables import method, tables
    from matvlm.report import write_profile

    given = {name: value for name in Profile.model_fields if (value := getattr(options, name)) is not None}
    settings = parse_recipe(json.dumps(given), "options", kind=Profile)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = profile(name_checkpoints(options.checkpoints), settings, Reporter(), device)
    if options.out:
        write_profile(result, options.out, Reporter())
    for one in tables(result):
        print(f"{one.title}\n{table(one.rows)}\n")
    print(method(result))
    print(*(f"{name}: {value}" for name, value in result.machine.items()), sep="\n")
