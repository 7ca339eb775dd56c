"""The model card of a hybrid: the README.md that lies beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_USE = """\
```python
import matvlm

model, processor = matvlm.load("{name}")
```

The model is a stock transformers model whose mixers take the place of `self_attn`: `generate()`, batches, padding and
caches work as they do for its teacher. After `import matvlm` transformers' Auto classes open this folder too."""


def write_card(path: Path, section: Mapping[str, Any], name: str, model: PreTrainedModel) -> None:
    """Write the card of the hybrid ``model``.

    Args:
        path: the file.
        section: the ``matvlm`` section of its config.json, with ``provenance``.
        name: what to call it.
    """
    provenance = dict(section.get("provenance") or {})
    recipe = provenance.pop("recipe", None)
    parts = [
        _front_matter(provenance, model),
        f"# {name}",
        "A hybrid of attention and Mamba-2, made by matvlm after MaTVLM (arXiv 2503.13440).",
        _facts(section, provenance, model),
    ]
    if caveats := section.get("caveats"):
        parts += ["## Where it cannot equal its teacher", "\n".join(f"- {caveat}" for caveat in caveats)]
    parts += ["## Use", _USE.format(name=name)]
    if recipe is not None:
        dumped = yaml.safe_dump(recipe, sort_keys=False).strip()
        parts += ["## Recipe", f"```yaml\n{dumped}\n```"]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(provenance: Mapping[str, Any], model: PreTrainedModel) -> str:
    """The metadata that the Hugging Face hub reads."""
    sees = type(model.config).__mro__[1] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if sees else "text-generation",
        "tags": ["matvlm", "mamba-2", "hybrid"],
    }
    teacher = str(provenance.get("teacher", ""))
    if _HUB_ID.fullmatch(teacher):
        fields["base_model"] = teacher
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _facts(section: Mapping[str, Any], provenance: Mapping[str, Any], model: PreTrainedModel) -> str:
    mixers: dict[str, dict[str, Any]] = section["mixers"]
    shown = next(iter(mixers.values()))
    rows = [
        ("class", f"{type(model).__name__} ({section['model_type']})"),
        ("layers that are Mamba-2", ", ".join(map(str, section["layers"]))),
        ("initialisation", section["init"] + (", calibrated" if section.get("calibrated") else "")),
        ("mixer", ", ".join(f"{option} {value}" for option, value in shown.items())),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("weights", str(model.dtype).removeprefix("torch.")),
        *((key, str(value)) for key, value in provenance.items()),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
