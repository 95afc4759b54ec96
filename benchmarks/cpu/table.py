"""Rows of the result table: the issue's floors and aims, printing and writing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""``name``, ``ratio`` (the median), ``floor``, ``aim`` (None where there is none), ``min``, ``max``."""


def row(name: str, values: Sequence[float], goals: dict[str, tuple[float, float]]) -> Row:
    """One row, with the floor and the aim that ``goals`` has for its name."""
    floor, aim = goals.get(name, (None, None))
    return {
        "name": name,
        "ratio": statistics.median(values),
        "floor": floor,
        "aim": aim,
        "min": min(values),
        "max": max(values),
    }


def print_head() -> None:
    """Above the first row."""
    print(f"{'':52s} {'ratio':>7s} {'floor':>7s} {'aim':>7s} {'min':>7s} {'max':>7s}", flush=True)


def print_row(r: Row) -> None:
    """One line, with what it has reached."""
    cells = [f"{r[k]:7.2f}" if r[k] is not None else "      -" for k in ("ratio", "floor", "aim", "min", "max")]
    print(f"{r['name']:52s} {' '.join(cells)}  {verdict(r)}", flush=True)


def verdict(r: Row) -> str:
    """What was reached, or nothing where there is no floor. A floor above its aim is an upper bound."""
    if r["floor"] is None:
        return ""
    sign = -1 if r["floor"] > r["aim"] else 1
    if sign * r["ratio"] >= sign * r["aim"]:
        return "aim"
    return "floor" if sign * r["ratio"] >= sign * r["floor"] else "BELOW FLOOR"


def write(path: Path, rows: Sequence[Row], **about: Any) -> None:
    """``{"rows": […], …}`` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": list(rows)}, indent=2) + "\n")
