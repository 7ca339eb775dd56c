"""The model ``matvlm`` of lm-eval, and lm-eval's own command line with it: importing this module registers it.

    python -m matvlm lm-eval --model matvlm --model_args checkpoint=runs/NAME/student --batch_size 32 \\
        --tasks pope --metadata '{"data_root": "POPE"}'

With torchrun before ``-m`` several processes share the questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from matvlm.evaluate import tasks
from matvlm.evaluate.checkpoint import model_hash, open_checkpoint
from matvlm.evaluate.harness import VLM
from matvlm.evaluate.results import EvaluationError
from matvlm.world import LONGEST_WAIT, join

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def run_lm_eval(arguments: Sequence[str], resolve: Callable[[str], str]) -> None:
    """lm-eval's command line, which also finds our tasks unless ``--include_path`` names others.

    Args:
        arguments: as one would type them after ``lm-eval``.
        resolve: what a checkpoint's name in a registry stands for.
    """
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.utils import setup_logging

    CheckpointVLM.resolve = staticmethod(resolve)
    asks = {word.partition("=")[0] for word in arguments}
    ours = [] if not asks or asks & {"--include_path", "-h", "--help"} else ["--include_path", str(tasks.FOLDER)]
    before, sys.argv = sys.argv, ["lm-eval", *arguments, *ours]
    try:
        setup_logging()
        command_line = HarnessCLI()
        command_line.execute(command_line.parse_args())
    finally:
        sys.argv = before


@register_model("matvlm")
class CheckpointVLM(VLM):
    """A checkpoint as lm-eval sees it; the arguments are those of ``--model_args``.

    Args:
        checkpoint: a model folder, hybrid or not, anything that ``matvlm.load`` opens.
        dtype: ``auto`` is that of the files, and float32 on a CPU.
        device: by default ``cuda``; without a GPU it is ``cpu`` in any case.
        batch_size: in questions.
        max_batch_size: of lm-eval's automatic batch size, which there is none of here.

    Raises:
        EvaluationError: an argument is wrong or missing, or the checkpoint cannot be opened.
    """

    resolve: ClassVar[Callable[[str], str]] = staticmethod(str)

    def __init__(
        self,
        checkpoint: str = "",
        dtype: Dtype = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        if unknown or not checkpoint:
            got = ", ".join(unknown) or "no checkpoint"
            raise EvaluationError(f"model_args: expected checkpoint=URI, dtype, device, batch_size; got {got}")
        if dtype not in get_args(Dtype):
            raise EvaluationError(f"model_args: dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
        if not str(batch_size).isdigit() or int(batch_size) == 0:
            raise EvaluationError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not torch.cuda.is_available():
            device = "cpu"  # lm-eval's own default is cuda:0
        world, device = join(device or "cuda", LONGEST_WAIT)
        kind = None if dtype == "auto" else getattr(torch, dtype)
        self.uri = type(self).resolve(checkpoint)
        super().__init__(*open_checkpoint(self.uri, device, kind), int(batch_size), label=checkpoint, world=world)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> CheckpointVLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> CheckpointVLM:
        """As the arguments say; what they say as well goes before lm-eval's ``--batch_size`` and ``--device``."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes down about the model."""
        return {
            "model_uri": self.uri,
            "model_sha": model_hash(self.model, self.processor),
            "model_dtype": str(self.model.dtype),
            "model_num_parameters": self.model.num_parameters(),
        }
