"""A replica as its callers see it: how fast it is, how often it died, what it is doing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_STRAGGLES = 0.5
"""A replica straggles if it computes fewer than this many times the tokens per second that the fastest one does."""
_FEWEST_PASSES = 5
"""Before that many passes a replica's speed is that of a first one, which also checks the fast path."""
_MEMORY = 0.7
"""Share of the older calls in a replica's measured speed."""


@dataclass(eq=False)
class Member:
    """One replica.

    Attributes:
        actor: Ray's handle.
        facts: see ``Replica.facts``; as of the last time that it answered.
        restarts: seen so far.
        speed: tokens per second of passes, recent calls weighing more; None before the first.
        passes: computed so far, since its last restart.
        tokens: of passes and samples so far.
        passing: passes that it takes part in now.
        in_flight: sequences being sampled.
        leaving: it gets no more work, and ends with what it has.
    """

    actor: Any
    facts: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    speed: float | None = None
    passes: int = 0
    tokens: int = 0
    passing: int = 0
    in_flight: int = 0
    leaving: bool = False

    @property
    def busy(self) -> bool:
        """Somebody waits for its answer."""
        return self.passing > 0 or self.in_flight > 0

    def seen(self, pid: int) -> None:
        """Note which process answered."""
        if self.facts.get("pid", pid) != pid:
            self.restarts += 1
            self.passes, self.speed = 0, None
            logger.warning("a replica died and was started again (process %s is now %s)", self.facts["pid"], pid)
        self.facts["pid"] = pid

    def computed(self, tokens: int, seconds: float, pid: int) -> None:
        """Note a pass."""
        self.seen(pid)
        self.tokens += tokens
        self.passes += 1
        speed = tokens / max(seconds, 1e-9)
        self.speed = speed if self.speed is None else _MEMORY * self.speed + (1 - _MEMORY) * speed

    def row(self) -> dict[str, Any]:
        """What is known of it, for a table; None is what it has not said yet."""
        return {
            **dict.fromkeys(("pid", "node", "host", "device", "dtype", "memory")),
            **self.facts,
            "restarts": self.restarts,
            "tokens": self.tokens,
            "tokens_per_second": self.speed,
            "sampling": self.in_flight,
        }


def stragglers_of(members: Sequence[Member]) -> list[int]:
    """Numbers of the replicas that compute less than half of the tokens per second that the fastest one does."""
    speeds = {number: m.speed or 0.0 for number, m in enumerate(members) if m.passes >= _FEWEST_PASSES}
    return [number for number, speed in speeds.items() if speed < _STRAGGLES * max(speeds.values())]
