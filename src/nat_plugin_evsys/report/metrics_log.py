"""``metrics.jsonl``: one JSON row per epoch, validation and warm start.

Every row has ``event`` (``base``, ``warm_start``, ``validation`` or ``epoch``), ``epoch`` and ``time`` (seconds since
1970). ``epoch`` counts from 1 for an epoch's own row; elsewhere it is the number of epochs finished, so the validation
before the first one has 0. ``base`` is the validation of the base model, before a warm start. See ``json_lines`` for
numbers that are not finite.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import JsonLinesReader, append_json_lines, json_line

BASE = "base"
WARM_START = "warm_start"
VALIDATION = "validation"
EPOCH = "epoch"

RELOADED = "reloaded"
"""Where an epoch's row names the checkpoint that was loaded after it."""


class MetricsLog:
    """Appends rows that are on disk when ``append`` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = JsonLinesReader(path)

    def append(self, event: str, epoch: int, **values: Any) -> dict[str, Any]:
        """Write one row.

        Returns:
            The row as given (including numbers that are not finite).

        Raises:
            TypeError: a value has no JSON form; nothing is written.
        """
        row = {"event": event, "epoch": epoch, "time": round(time.time(), 3), **values}
        append_json_lines(self.path, [row])
        return row

    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first, without a last line that a crash cut short; each is read once.

        Raises:
            DataError: another line is not a JSON object.
        """
        return self._reader.read()

    def epochs(self) -> list[dict[str, Any]]:
        """Those of ``rows`` that are of epochs; raises as it does."""
        return [row for row in self.rows() if row["event"] == EPOCH]

    def truncate_after(self, epoch: int) -> int:
        """Drop the rows of epochs after ``epoch``, so that a resumed run writes each of them once.

        Returns:
            How many rows were dropped.
        """
        rows = self.rows()
        kept = [row for row in rows if int(row.get("epoch", 0)) <= epoch]
        if len(kept) < len(rows):
            atomic_write(self.path, "".join(map(json_line, kept)))
        return len(rows) - len(kept)


def reloads(rows: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Each epoch after which an earlier checkpoint was loaded -> the epoch that had saved these weights."""
    found: dict[int, int] = {}
    for row in rows:
        if RELOADED in row:
            saved = int(row[RELOADED].rpartition("-")[2])  # epoch-0003
            found[row["epoch"]] = found.get(saved, saved)
    return found
