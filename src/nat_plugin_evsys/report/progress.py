"""What a run shows while it runs: a live display on a terminal, plain lines in a pipe, or nothing.

Everything goes to stderr, so that stdout ends with the summary alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

if TYPE_CHECKING:
    from nat.data_models.finetuning import TrainingJobStatus

Mode = Literal["auto", "rich", "plain", "none"]


class Progress:
    """The display's contract; this one shows nothing. Cheap to call often: a display decides itself what it draws."""

    def phase(self, name: str, detail: str = "") -> None:
        """A new phase begins, e.g. ``phase("rollouts", "epoch 2/4")``."""

    def rollouts(self, done: int, total: int) -> None:
        """How many rollouts of this phase have ended."""

    def steps(self, done: int, total: int, note: str = "") -> None:
        """How many optimizer steps of this phase are done."""

    def job(self, status: TrainingJobStatus) -> None:
        """How far the training job is."""

    def epoch_done(self, epoch: int, epochs: int, row: Mapping[str, Any]) -> None:
        """An epoch has ended.

        Args:
            epoch: counted from 1.
            epochs: how many there are.
            row: its row of metrics.jsonl.
        """

    def validation(self, epoch: int, reward: float) -> None:
        """The held-out reward after ``epoch`` epochs (0: before training)."""

    def close(self) -> None:
        """Leave the terminal as it was found. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PlainProgress(Progress):
    """One line at each change of phase, at each epoch's end, and every ``interval`` seconds in between.

    Args:
        stream: where the lines go.
        interval: seconds between two lines of one phase; its last line always comes.
    """

    def __init__(self, stream: TextIO, interval: float = 10.0) -> None:
        self._stream = stream
        self._interval = interval
        self._started = time.monotonic()
        self._last = -float("inf")
        self._shown = ""
        self._phase = ""

    def phase(self, name: str, detail: str = "") -> None:
        """See Progress."""
        self._phase = phase_text(name, detail)
        self._write(self._phase)

    def rollouts(self, done: int, total: int) -> None:
        """See Progress."""
        self._update(f"{self._phase}: {done}/{total} rollouts", last=done >= total)

    def steps(self, done: int, total: int, note: str = "") -> None:
        """See Progress."""
        self._update(f"{self._phase}: {steps_text(done, total, note)}", last=done >= total)

    def job(self, status: TrainingJobStatus) -> None:
        """See Progress."""
        self._update(f"{self._phase}: {job_text(status)}", last=status.status in ("completed", "failed", "canceled"))

    def epoch_done(self, epoch: int, epochs: int, row: Mapping[str, Any]) -> None:
        """See Progress."""
        self._write(epoch_text(epoch, epochs, row))

    def validation(self, epoch: int, reward: float) -> None:
        """See Progress."""
        self._write(validation_text(epoch, reward))

    def _update(self, text: str, *, last: bool) -> None:
        if text != self._shown and (last or time.monotonic() - self._last >= self._interval):
            self._write(text)

    def _write(self, text: str) -> None:
        self._last = time.monotonic()
        self._shown = text
        # one write, so that a line of another thread's log cannot land inside ours
        self._stream.write(f"[evsys {self._last - self._started:6.1f}s] {text}\n")
        self._stream.flush()


def create_progress(mode: Mode = "auto", stream: TextIO | None = None) -> Progress:
    """A display on ``stream`` (default: stderr). ``auto`` is ``rich`` on a terminal and ``plain`` elsewhere."""
    target = sys.stderr if stream is None else stream
    if mode == "none":
        return Progress()
    if mode == "rich" or (mode == "auto" and target.isatty()):
        from .live import RichProgress

        return RichProgress(target)
    return PlainProgress(target)


def phase_text(name: str, detail: str) -> str:
    """``rollouts, epoch 2/4``."""
    return f"{name}, {detail}" if detail else name


def steps_text(done: int, total: int, note: str) -> str:
    """``step 3/40, loss 1.234``."""
    return f"step {done}/{total}" + (f", {note}" if note else "")


def job_text(status: TrainingJobStatus) -> str:
    """``training 40%, step 2/5, loss -0.1234, 950 tokens/s``, as far as the status tells."""
    known = status.metadata or {}
    parts = [str(known["phase"])] if known.get("phase") else [status.status.value]
    if status.progress is not None:
        parts[0] += f" {status.progress:.0f}%"
    if known.get("steps") is not None:
        parts.append(f"step {known.get('step', 0)}/{known['steps']}")
    if known.get("loss") is not None:
        parts.append(f"loss {known['loss']:.4f}")
    if known.get("tokens_per_second") is not None:
        parts.append(f"{known['tokens_per_second']:.0f} tokens/s")
    if status.status == "failed" and status.message:
        parts.append(status.message)
    return ", ".join(parts)


def epoch_text(epoch: int, epochs: int, row: Mapping[str, Any]) -> str:
    """``epoch 2/4 done: reward 0.500 (0.000 to 1.000), loss …, 48 calls trained, 16 dropped, 12.3 s``.

    What the row does not say itself is looked up in its ``job``, the metadata of the training job's last status.
    """
    facts = {**(row.get("job") or {}), **row}
    parts = []
    if facts.get("reward_mean") is not None:
        spread = ""
        if facts.get("reward_min") is not None and facts.get("reward_max") is not None:
            spread = f" ({facts['reward_min']:.3f} to {facts['reward_max']:.3f})"
        parts.append(f"reward {facts['reward_mean']:.3f}{spread}")
    if facts.get("loss") is not None:
        parts.append(f"loss {facts['loss']:.4f}")
    if facts.get("trained") is not None:
        parts.append(f"{facts['trained']} calls trained")
    if facts.get("dropped"):
        parts.append(f"{sum(facts['dropped'].values())} dropped")
    seconds = [facts[name] for name in ("rollout_seconds", "training_seconds") if facts.get(name) is not None]
    if seconds:
        parts.append(f"{sum(seconds):.1f} s")
    return f"epoch {epoch}/{epochs} done" + (f": {', '.join(parts)}" if parts else "")


def validation_text(epoch: int, reward: float) -> str:
    """``held-out reward 0.625 after 2 epochs``."""
    when = "before training" if epoch == 0 else f"after {epoch} epoch{'' if epoch == 1 else 's'}"
    return f"held-out reward {reward:.3f} {when}"
