"""The operators of a Mamba-2 mixer and of a decoding step, and which implementation of them runs.

A mixer's scan and convolution: ``torch``, pure PyTorch, any device, the reference.  ``mamba_ssm``: the Triton kernels
of the mamba-ssm package for the scan and, where it is installed too, causal-conv1d for the convolution; CUDA only, but
for Triton's interpreter (``TRITON_INTERPRET=1``), which tests kernels on a CPU. For a decoding step see
``has_decode_kernels``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "mamba_ssm")
VARIABLE = "MATVLM_KERNELS"
"""Environment variable that chooses the backend wherever ``auto`` is asked for."""


@torch.compiler.assume_constant_result
def resolve_backend(requested: str, device: torch.device) -> str:
    """``torch`` or ``mamba_ssm``, whichever runs for tensors on ``device``.

    ``requested`` is one of ``BACKENDS``; with ``auto`` the variable ``MATVLM_KERNELS`` decides if it is set, and
    otherwise the device and what is installed. The choice is logged once per process.

    Raises:
        ValueError: an unknown name.
        RuntimeError: ``mamba_ssm`` is forced where it cannot run.
    """
    source = "kernels"
    if requested == "auto" and os.environ.get(VARIABLE):
        requested, source = os.environ[VARIABLE], VARIABLE
    if requested not in BACKENDS:
        raise ValueError(f"{source}={requested!r} is not one of {', '.join(BACKENDS)}")
    return _resolve(requested, source, device.type)


@cache
def _resolve(requested: str, source: str, device_type: str) -> str:
    if requested == "torch" or (requested == "auto" and device_type != "cuda"):
        log.info("Mamba-2 kernels on %s: torch", device_type)
        return "torch"
    if requested == "mamba_ssm" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{source}=mamba_ssm needs CUDA tensors, got {device_type}: use auto or torch")
    try:
        load_function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    except ImportError as error:
        if requested == "mamba_ssm":
            raise RuntimeError(
                f"{source}=mamba_ssm, but the package cannot be imported ({error}): install requirements-gpu.txt, or "
                "use auto or torch"
            ) from error
        log.warning("Mamba-2 on CUDA without mamba-ssm's Triton kernels, much slower: install requirements-gpu.txt")
        return "torch"
    log.info("Mamba-2 kernels on %s: mamba_ssm", device_type)
    return "mamba_ssm"


@cache
def load_function(module: str, name: str) -> Callable[..., Any]:
    """A function of an optional package; ImportError where that is missing or broken."""
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


@torch.compiler.assume_constant_result
@cache
def has_fused_conv() -> bool:
    """Whether causal-conv1d can be imported; says so once if it cannot."""
    try:
        load_function("causal_conv1d", "causal_conv1d_fn")
    except ImportError as error:
        log.warning("causal-conv1d cannot be imported (%s): the convolution before the scan runs in torch", error)
        return False
    return True


@cache
def has_decode_kernels(device_type: str) -> bool:
    """Whether a decoding step takes the Triton kernels of ``matvlm.kernels.decode``; says so once if a GPU does not.

    It does on a GPU, unless ``MATVLM_KERNELS`` is ``torch``. Elsewhere, and then, PyTorch computes the same.
    """
    if device_type != "cuda":
        return False
    if os.environ.get(VARIABLE) == "torch":
        log.warning("Decoding without Triton's kernels, much slower, because %s is torch", VARIABLE)
        return False
    try:
        importlib.import_module("triton")
    except ImportError as error:
        log.warning("Decoding without Triton's kernels, much slower: %s", error)
        return False
    return True
