"""matvlm: turn a vision-language model into a Mamba-2 hybrid, distil it back to quality, and measure what it gained."""

METAFLOW_PACKAGE_POLICY = "include"
"""Metaflow ships this whole package with a flow that imports it."""

__version__ = "0.1.0"
