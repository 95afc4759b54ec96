"""The live display on a terminal: one moving status line; finished items scroll away above it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from nat_plugin_evsys.errors import visible
from nat_plugin_evsys.report.display import Display
from nat_plugin_evsys.report.texts import epoch_text, job_text, phase_text, steps_text, validation_text

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobStatus


class LiveDisplay(Display):
    """Spinner, phase, bar, current activity, elapsed time. Log lines appear above it, never through it.

    It starts with the first phase, so that earlier output (such as a config error) is unaffected.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bars.add_task("", total=None, note="", start=False)
        self._redirected: list[tuple[logging.StreamHandler[Any], TextIO]] = []
        self._running = False

    def phase(self, name: str, detail: str = "") -> None:
        """See Display."""
        self._start()
        self._bars.reset(self._task, description=phase_text(name, detail), total=None, note="")

    def rollouts(self, done: int, total: int) -> None:
        """See Display."""
        self._bars.update(self._task, completed=done, total=total, note=f"{done}/{total} rollouts")

    def steps(self, done: int, total: int, note: str = "") -> None:
        """See Display."""
        self._bars.update(self._task, completed=done, total=total, note=steps_text(done, total, note))

    def job(self, status: TrainingJobStatus) -> None:
        """See Display."""
        self._bars.update(self._task, completed=status.progress or 0.0, total=100.0, note=job_text(status))

    def epoch_done(self, epoch: int, epochs: int, row: Mapping[str, Any]) -> None:
        """See Display."""
        self._say(epoch_text(epoch, epochs, row))

    def validation(self, epoch: int, reward: float, when: str | None = None, policy: str | None = None) -> None:
        """See Display."""
        self._say(validation_text(epoch, reward, when, policy))

    def notice(self, text: str) -> None:
        """See Display."""
        self._say(text, style="bold yellow")

    def close(self) -> None:
        """See Display."""
        if self._running:
            self._running = False
            self._bars.stop()
            while self._redirected:
                handler, stream = self._redirected.pop()
                handler.setStream(stream)

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(visible(text), markup=False, highlight=False, style=style)

    def _start(self) -> None:
        if self._running:
            return
        self._running = True
        # A log handler keeps the stream that it was made with, which rich's own redirection does not reach.
        for handler in _terminal_handlers():
            self._redirected.append((handler, handler.stream))
            handler.setStream(FileProxy(self._console, handler.stream))
        self._bars.start()


def _terminal_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Every log handler that writes to this process's terminal."""
    streams = (sys.stderr, sys.stdout, sys.__stderr__, sys.__stdout__)
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    seen: set[int] = set()
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and id(handler) not in seen:
                seen.add(id(handler))
                if any(handler.stream is stream for stream in streams) and handler.stream.isatty():
                    yield handler
