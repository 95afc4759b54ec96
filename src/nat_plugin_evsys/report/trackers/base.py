"""The contract of a tracker, and what it receives about a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Axis = Literal["epoch", "optimizer_step"]
"""What a value is drawn over: finished epochs, or optimizer steps taken. Each axis only grows."""

Ending = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        name: the run directory's name; unique within ``project``, and the same when the run is resumed.
        project: what groups runs.
        directory: the run directory, where a tracker may keep its own files.
        config: the resolved configuration, secrets redacted.
    """

    name: str
    project: str
    directory: Path
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text and numbers under named columns.

    Attributes:
        name: ``group/name``.
        epoch: the epoch that it shows.
    """

    name: str
    epoch: int
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]


class Tracker(Protocol):
    """One experiment tracker. All calls come from one thread; any of them may raise anything."""

    def check(self) -> None:
        """Refuse settings that cannot work, before anything is loaded and without the network.

        Raises:
            ConfigError: the library is absent or a setting of it is missing; the message says what to type.
        """
        ...

    def open(self, run: TrackedRun) -> str:
        """Start or continue the run. Returns where to find it: a URL, or a command to type."""
        ...

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        """Finite numbers at one place of an axis; names are ``group/name`` of letters, digits and ``_ - . /``."""
        ...

    def table(self, table: Table) -> None:
        """Add a table, next to those of other epochs."""
        ...

    def close(self, ending: Ending) -> None:
        """Send the rest and end the run."""
        ...
