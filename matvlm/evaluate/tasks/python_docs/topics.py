"""The language reference that Python carries for ``help()``: about 80 topics, half a megabyte of technical English.

It differs a little between versions of Python, so perplexities compare only where ``source`` of the data is the same.
"""

from __future__ import annotations

import json
import platform
from typing import Any


def load(*, name: str, **_: Any) -> dict[str, Any]:
    """The topics in the order of their names, as lm-eval wants them."""
    from pydoc_data.topics import topics

    from datasets import Dataset

    rows = [{"id": f"{name}-{topic}", "text": text} for topic, text in sorted(topics.items())]
    dataset = Dataset.from_list(rows)
    source = f"pydoc topics of Python {platform.python_version()}"
    dataset.info.description = json.dumps({"source": source, "questions": len(rows), "left_out": []})
    return {"test": dataset}
