"""``metrics.jsonl``: one JSON row per epoch, validation and warm start.

Every row has ``event`` (``warm_start``, ``validation`` or ``epoch``), ``epoch`` and ``time`` (seconds since 1970).
``epoch`` counts from 1 for an epoch's own row; elsewhere it is the number of epochs finished, so the validation before
training has 0. A number that is not finite is written as ``null`` and named in ``non_finite``, since JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.files import atomic_write, to_json

WARM_START = "warm_start"
VALIDATION = "validation"
EPOCH = "epoch"


class MetricsLog:
    """Appends rows that are on disk when ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, epoch: int, **values: Any) -> dict[str, Any]:
        """Write one row.

        Returns:
            The row as it was given (numbers that are not finite included).

        Raises:
            TypeError: a value has no JSON form; nothing is written.
        """
        row = {"event": event, "epoch": epoch, "time": round(time.time(), 3), **values}
        odd = {name: str(value) for name, value in values.items() if _not_finite(value)}
        text = to_json({**row, "non_finite": odd} if odd else row)
        self._mend()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first. A last line that a crash cut short is left out.

        Raises:
            DataError: another line is not a JSON object.
        """
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines = text.split("\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            row = _parse(line)
            if row is not None:
                rows.append(row)
            elif line.strip() and number < len(lines):
                raise DataError(f"{self.path}:{number}: not a JSON object: {line[:80]!r}")
        return rows

    def truncate_after(self, epoch: int) -> int:
        """Drop the rows of epochs after ``epoch``, so that a resumed run writes each of them once.

        Returns:
            How many rows were dropped.
        """
        rows = self.rows()
        kept = [row for row in rows if int(row.get("epoch", 0)) <= epoch]
        if len(kept) < len(rows):
            atomic_write(self.path, "".join(to_json(row) + "\n" for row in kept))
        return len(rows) - len(kept)

    def _mend(self) -> None:
        """End a torn last line: keep it if it is a whole row that only lacks its newline, else cut it off."""
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return
        with open(self.path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            raw = file.read()
            start = raw.rfind(b"\n") + 1
            if _parse(raw[start:].decode("utf-8", errors="replace")) is None:
                file.truncate(start)
            else:
                file.write(b"\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _not_finite(value: Any) -> bool:
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    return isinstance(plain, float) and not math.isfinite(plain)
