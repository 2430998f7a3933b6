"""How results are printed: JSON alone, or lines and aligned tables that leave out what there is not."""

from __future__ import annotations

import json
import math
import numbers
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

GAP = "  "
MISSING = "-"
_ROUNDING = 1e-12
DEFAULT_WIDTH = 120
"""Columns of a table where there is no terminal, and none in the environment's COLUMNS."""


def show(result: Mapping[str, Any], as_json: bool) -> None:
    """Print a result on standard output: as JSON, or as text (see `as_text`) no wider than the terminal."""
    if as_json:
        print(json.dumps(_finite(result), indent=2, default=str, allow_nan=False))
    else:
        print(as_text(result, shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns))


def as_text(result: Mapping[str, Any], width: int | None = None, indent: str = "") -> str:
    """One `name: value` a line; lists of records as aligned tables and records in records indented under their name.

    What is None, not a number or empty is left out. `width`: the most columns of a table, which is cut into several
    where it is wider; None: as wide as it is.
    """
    lines = []
    for name, value in result.items():
        if _is_missing(value):
            continue
        if _is_table(value):
            lines.append(f"{indent}{name}:\n{table(value, width, indent + GAP)}")
        elif isinstance(value, Mapping):
            if within := as_text(value, width, indent + GAP):
                lines.append(f"{indent}{name}:\n{within}")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else _rounded(value)
            lines.append(f"{indent}{name}: {text}")
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], width: int | None = None, indent: str = GAP) -> str:
    """Records as a table with a heading, its columns aligned; a column in which nothing stands is left out.

    A table wider than `width` is cut into several below each other, which all begin with the first column.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [name for name in names if not all(_is_missing(row.get(name)) for row in rows)]
    columns = [[str(name), *(_cell(row.get(name)) for row in rows)] for name in names]
    widths = [max(map(len, column)) for column in columns]
    padded = [[f"{cell:<{size}}" for cell in column] for column, size in zip(columns, widths, strict=True)]
    blocks = [
        "\n".join((indent + GAP.join(line)).rstrip() for line in zip(*(padded[place] for place in places), strict=True))
        for places in _blocks(widths, width, len(indent))
    ]
    return "\n\n".join(blocks)


def _blocks(widths: Sequence[int], width: int | None, margin: int) -> list[list[int]]:
    """The columns of each part of a table that is cut to `width`, by their places."""
    blocks: list[list[int]] = [[]]
    for place, size in enumerate(widths):
        used = margin + sum(widths[other] + len(GAP) for other in blocks[-1])
        if width is not None and len(blocks[-1]) > 1 and used + size > width:
            blocks.append([0])
        blocks[-1].append(place)
    return blocks


def _cell(value: Any) -> str:
    if _is_missing(value):
        return MISSING
    return f"{_rounded(value):.4g}" if isinstance(value, float) else str(value)


def _rounded(value: Any) -> Any:
    """A number without what is left of rounding: 0 for 2.776e-17, which is the bound of an interval that ends there."""
    return 0.0 if isinstance(value, float) and abs(value) < _ROUNDING else value


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ == "NAType" or value != value:  # NaN is the one value unequal to itself
        return True
    return isinstance(value, str | list | dict) and not value


def _finite(value: Any) -> Any:
    """`value` with null for NaN, NA and infinite numbers, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, numbers.Integral):  # numpy's, too
        return value if isinstance(value, int) else int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return None if type(value).__name__ in ("NAType", "NaTType") else value
