"""matvlm: turn a vision-language model into a Mamba-2 hybrid, distil it back to quality, and measure what it gained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matvlm.models.auto import register_with_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METAFLOW_PACKAGE_POLICY = "include"
"""Metaflow ships this whole package with a flow that imports it."""

__version__ = "0.1.0"

register_with_transformers()


def load(uri: str, device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """Open a model, hybrid or not, and its processor.

    ``uri`` is a local folder, ``s3://``, ``package://NAME``, a Hugging Face hub id (also ``org/name@revision``),
    ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``. What TinyLLaVA and MaTVLM released opens as well. On a CPU the
    weights are float32, elsewhere as in the files.

    Raises:
        ValueError, OSError, RuntimeError: there is no such model, or it is damaged; the message says what and where.
    """
    from matvlm.models import locate
    from matvlm.tracking import resolve_checkpoint

    return locate.load(resolve_checkpoint(uri), device)
