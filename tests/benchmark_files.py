"""What the small benchmark data sets are written with."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

PIXELS = 32


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """An image of random pixels, encoded."""
    noise = random.Random(seed).randbytes(PIXELS * PIXELS * 3)
    out = io.BytesIO()
    Image.frombytes("RGB", (PIXELS, PIXELS), noise).save(out, kind)
    return out.getvalue()


def write_parquet(rows: list[dict[str, Any]], path: Path, image_columns: tuple[str, ...] = ("image",)) -> None:
    """``rows`` as the hub keeps them; the image columns hold encoded bytes, or None."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for name in image_columns:
        columns[name] = [content and {"bytes": content, "path": None} for content in columns[name]]
    dataset = datasets.Dataset.from_dict(columns)
    for name in image_columns:
        dataset = dataset.cast_column(name, datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


def write_json(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(values: list[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_image(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
