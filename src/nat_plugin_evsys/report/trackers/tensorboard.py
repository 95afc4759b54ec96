"""TensorBoard event files, written by torch's own SummaryWriter."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml

from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun
from nat_plugin_evsys.report.trackers.extras import require_extra

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

DIRECTORY = "tensorboard"
"""Where the event files are, within the run directory."""


class TensorBoardTracker:
    """Scalars, the configuration and the tables as text."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def check(self) -> None:
        """See Tracker."""
        require_extra("tensorboard", "tensorboard")

    def open(self, run: TrackedRun) -> str:
        """See Tracker."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.directory / DIRECTORY))
        self._writer.add_text("config", _preformatted(yaml.safe_dump(dict(run.config), sort_keys=False)))
        return f"tensorboard --logdir {shlex.quote(os.path.relpath(run.directory.parent))}"

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._open_writer.add_scalar(name, value, at)

    def table(self, table: Table) -> None:
        """See Tracker."""
        lines = [_markdown_row(table.columns), _markdown_row(["---"] * len(table.columns))]
        lines += [_markdown_row(["" if cell is None else str(cell) for cell in row]) for row in table.rows]
        self._open_writer.add_text(table.name, "\n".join(lines), table.epoch)

    def close(self, ending: Ending) -> None:
        """See Tracker."""
        self._open_writer.close()

    @property
    def _open_writer(self) -> SummaryWriter:
        assert self._writer is not None, "open() comes first"
        return self._writer


def _preformatted(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _markdown_row(cells: object) -> str:
    escaped = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells)  # type: ignore[attr-defined]
    return f"| {' | '.join(escaped)} |"
