"""What a running job reports, and what an ended one accounts for."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from nat_plugin_evsys.calls import CallFate, CallKey, CallTally, DropReason

Phase = Literal["queued", "preparing", "forward_backward", "optim_step", "publishing", "done"]


@dataclass(slots=True)
class JobReport:
    """Written by the work of a job, read by its status.

    Attributes:
        phase: what the job is doing, or was doing when it ended early.
        step: current optimizer step (from 1), or the last one.
        steps: optimizer steps of the whole job; 0 until they are known.
        progress: 0 to 100, never falls.
        loss: ``loss:sum`` of the last finished forward_backward.
        tokens_per_second: Datum tokens over the seconds spent in optimizer steps.
        message: what a user should know beyond the numbers.
        metrics: of the finished steps together.
        metrics_by_step: of each finished step.
        policy_version: the version that was published, if any.
    """

    phase: Phase = "queued"
    step: int = 0
    steps: int = 0
    progress: float = 0.0
    loss: float | None = None
    tokens_per_second: float | None = None
    message: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    metrics_by_step: list[dict[str, float]] = field(default_factory=list)
    policy_version: int | None = None
    _heartbeat: float = field(default_factory=time.monotonic)

    @property
    def seconds_since_heartbeat(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heartbeat

    def beat(self) -> None:
        """A sign of life."""
        self._heartbeat = time.monotonic()

    def enter(self, phase: Phase) -> None:
        """Start the next phase."""
        self.phase = phase
        self.beat()

    def advance(self, progress: float) -> None:
        """Raise ``progress`` (0 to 100); a lower value than the current one changes nothing."""
        self.progress = min(max(self.progress, progress), 100.0)
        self.beat()


@dataclass(slots=True)
class Account:
    """Where every call and every trajectory of a job went.

    Attributes:
        calls: ``calls.calls == calls.trained + sum(calls.dropped.values())``.
        trained_trajectories: trajectories with at least one trained call or preference pair.
        dropped_trajectories: the others, by reason.
        fates: what became of each call; empty for preference pairs, which are made of no calls.
        figures: about the whole input, besides the metrics of its steps.
    """

    calls: CallTally = field(default_factory=CallTally)
    trained_trajectories: int = 0
    dropped_trajectories: Counter[DropReason] = field(default_factory=Counter)
    fates: dict[CallKey, CallFate] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def as_metadata(self) -> dict[str, Any]:
        """``calls``, ``trained`` and ``dropped`` of calls; ``trajectories`` with ``trained`` and ``dropped``."""
        return {
            "calls": self.calls.calls,
            "trained": self.calls.trained,
            "dropped": dict(self.calls.dropped),
            "trajectories": {"trained": self.trained_trajectories, "dropped": dict(self.dropped_trajectories)},
        }
