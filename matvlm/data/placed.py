"""The ``datasets`` feature of prepared images. It needs ``datasets`` at once, so import it only where that is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets

from matvlm.data.images import decode, name_of, read_image


@dataclass
class PlacedImage(datasets.Image):
    """``datasets.Image`` for whatever place a ``StoredImage`` names: archives and S3 as well as files."""

    mode: str | None = "RGB"

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """The pixels, PIL RGB. Raises ``BadSample`` if they are not there and ``StorageError`` if S3 is not."""
        where = name_of(value)
        return decode(read_image(value, where), value, where)
