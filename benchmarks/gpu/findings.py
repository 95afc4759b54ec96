"""What a part of the check finds, said as it is found: a line on the console and a record for ``gpu.json``."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Record = dict[str, Any]
"""``kind``, and what belongs to it: ``exact`` has name, value and bound; ``row`` is a ``table.Row``; ``figure`` has a
name, value and unit; ``broken`` has name and text; ``about`` has what the part runs on."""


class Findings:
    """The records of one part.

    Args:
        send: takes each record at once, so that a part that is stopped loses nothing that it has found.
    """

    def __init__(self, send: Callable[[Record], None]) -> None:
        self._send = send

    def about(self, **facts: Any) -> None:
        """What the part runs on."""
        self._send({"kind": "about", **facts})

    def exact(self, name: str, value: float, bound: float) -> None:
        """A deviation that must not be above ``bound``; NaN is above any."""
        self._send({"kind": "exact", "name": name, "value": value, "bound": bound})
        print(f"  {name}: {value:.1e}{'' if value <= bound else f'  ABOVE {bound:.0e}'}", flush=True)

    def figure(self, name: str, value: float, unit: str = "") -> None:
        """Something measured that has no bound."""
        self._send({"kind": "figure", "name": name, "value": value, "unit": unit})
        print(f"  {name}: {value:.4g}{f' {unit}' if unit else ''}", flush=True)

    def row(self, row: Record) -> None:
        """Something measured that has a floor and an aim, or None for both."""
        self._send({"kind": "row", **row})
        print(f"  {row['name']}: {row['ratio']:.2f} ({row['min']:.2f} to {row['max']:.2f})", flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What raises in the block is a finding that fails the part, and the part goes on after it."""
        try:
            yield
        except Exception:  # noqa: BLE001 - boundary: a part that breaks must not hide what its other half finds
            text = traceback.format_exc()
            self._send({"kind": "broken", "name": name, "text": text})
            print(f"  {name} broke:\n{text}", flush=True)
