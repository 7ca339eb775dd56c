"""How ``inspect`` writes what it knows: headings, columns, sizes."""

from __future__ import annotations

import math


def heading(title: str, text: str) -> str:
    indented = "\n".join(f"  {line}" for line in text.splitlines())
    return f"{title}\n{indented}"


def table(rows: list[list[str]]) -> str:
    """``rows`` as text in columns, the first to the left, all others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def size_text(count: float) -> str:
    """A number of bytes with its unit, in powers of 1024."""
    units = ("B", "KiB", "MiB", "GiB")
    power = min(int(math.log2(max(count, 1))) // 10, len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"
