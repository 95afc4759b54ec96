"""What one run of one side gives: held-out reward by epoch, and what it took."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

GENERATIONS, GROUPS_PER_STEP, EPOCHS = 8, 8, 8
"""Of every side: attempts at a row, rows per optimizer step, passes over the rows."""

RANK = 32


@dataclass(frozen=True)
class Point:
    """After ``epoch`` epochs (0: before training).

    Attributes:
        heldout: mean reward of one greedy reply to each held-out row.
        sampled: mean reward of the epoch's rollouts; None before training.
        seconds: what all epochs so far took, without the measuring of ``heldout``.
    """

    epoch: int
    heldout: float
    sampled: float | None
    seconds: float


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        cpu_seconds: processor time of the whole run, loading and measuring included, of one thread; it can be compared
            when the machine was busy, which ``Point.seconds`` cannot.
    """

    side: str
    task: str
    rate: float
    seed: int
    points: list[Point]
    cpu_seconds: float

    @property
    def area(self) -> float:
        """Mean held-out reward over the run, by the trapezoidal rule: the area under the curve over its width."""
        pairs = zip(self.points, self.points[1:], strict=False)
        width = self.points[-1].epoch - self.points[0].epoch
        return sum((b.epoch - a.epoch) * (a.heldout + b.heldout) / 2 for a, b in pairs) / width

    @property
    def has_collapsed(self) -> bool:
        """Whether the last held-out reward kept less than half of the best gain."""
        first, last = self.points[0].heldout, self.points[-1].heldout
        gain = max(point.heldout for point in self.points) - first
        return gain >= 0.1 and last - first < gain / 2

    @property
    def is_stuck(self) -> bool:
        """Whether the policy has stopped trying: in the last three epochs samples earn what the greedy reply earns,
        and neither changes, below 0.9.
        """
        rewards = [reward for point in self.points[-3:] for reward in (point.heldout, point.sampled or 0.0)]
        return max(rewards) - min(rewards) < 0.05 and max(rewards) < 0.9

    def cpu_seconds_to(self, reward: float) -> float:
        """Processor time until the held-out reward is first at least ``reward``: the epochs' share of the run's."""
        seconds = next(point.seconds for point in self.points if point.heldout >= reward)
        return self.cpu_seconds * seconds / self.points[-1].seconds

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Curve:
        """What ``write`` wrote."""
        data = json.loads(path.read_text())
        return cls(**{**data, "points": [Point(**point) for point in data["points"]]})
