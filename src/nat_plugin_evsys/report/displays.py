"""The displays by name: plain lines, the live display, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from nat_plugin_evsys.errors import visible
from nat_plugin_evsys.report.display import Display, Mode
from nat_plugin_evsys.report.texts import epoch_text, job_text, phase_text, steps_text, validation_text

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobStatus


class PlainDisplay(Display):
    """One line at each change of phase, at each epoch's end, and every ``interval`` seconds in between.

    Args:
        stream: where the lines go.
        interval: seconds between two lines of one phase; its last line is always shown.
    """

    def __init__(self, stream: TextIO, interval: float = 10.0) -> None:
        self._stream = stream
        self._interval = interval
        self._started = time.monotonic()
        self._last = -float("inf")
        self._shown = ""
        self._phase = ""

    def phase(self, name: str, detail: str = "") -> None:
        """See Display."""
        self._phase = phase_text(name, detail)
        self._write(self._phase)

    def rollouts(self, done: int, total: int) -> None:
        """See Display."""
        self._update(f"{self._phase}: {done}/{total} rollouts", last=done >= total)

    def steps(self, done: int, total: int, note: str = "") -> None:
        """See Display."""
        self._update(f"{self._phase}: {steps_text(done, total, note)}", last=done >= total)

    def job(self, status: TrainingJobStatus) -> None:
        """See Display."""
        self._update(f"{self._phase}: {job_text(status)}", last=status.status in ("completed", "failed", "canceled"))

    def epoch_done(self, epoch: int, epochs: int, row: Mapping[str, Any]) -> None:
        """See Display."""
        self._write(epoch_text(epoch, epochs, row))

    def validation(self, epoch: int, reward: float, when: str | None = None, policy: str | None = None) -> None:
        """See Display."""
        self._write(validation_text(epoch, reward, when, policy))

    def notice(self, text: str) -> None:
        """See Display."""
        self._write(text)

    def _update(self, text: str, *, last: bool) -> None:
        if text != self._shown and (last or time.monotonic() - self._last >= self._interval):
            self._write(text)

    def _write(self, text: str) -> None:
        self._last = time.monotonic()
        self._shown = text
        stamp = f"[evsys {self._last - self._started:6.1f}s] "
        # one write, so that a line of another thread's log cannot land inside ours
        self._stream.write(stamp + visible(text).replace("\n", "\n" + " " * len(stamp)) + "\n")
        self._stream.flush()


def create_display(mode: Mode = "auto", stream: TextIO | None = None) -> Display:
    """A display on ``stream`` (default: stderr). ``auto`` is ``rich`` on a terminal and ``plain`` elsewhere."""
    target = sys.stderr if stream is None else stream
    if mode == "none":
        return Display()
    if mode == "rich" or (mode == "auto" and target.isatty()):
        from nat_plugin_evsys.report.live import LiveDisplay

        return LiveDisplay(target)
    return PlainDisplay(target)
