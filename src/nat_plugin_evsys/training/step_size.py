"""Limits the step size: the learning rate falls while epochs move the policy too far.

Adam moves each weight by about the learning rate, whatever that does to the policy. The KL of the policy after an
epoch's steps to the one that sampled grows with the square of the rate, so that

    factor <- min(1, factor * clamp(sqrt(aim / KL), 1/4, 3/2)),   aim = target / 2

brings it to the aim within a few epochs, and ``learning_rate`` is the highest rate that is ever used. Source: the
adaptive penalty of PPO (arXiv 1707.06347, section 4) with the rate in place of the penalty, as in rsl_rl (arXiv
2109.11978, "adaptive" schedule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AIM = 0.5
"""Share of the target that an epoch should move the policy by: few epochs then end early."""

MOST_DOWN, MOST_UP = 0.25, 1.5
LEAST = 1e-3


@dataclass(slots=True)
class StepSize:
    """What the learning rate is multiplied by.

    Attributes:
        target: KL in nats a token that the steps on one collection of rollouts may not exceed; None leaves the factor
            at 1.
        factor: from ``LEAST`` to 1.
    """

    target: float | None = None
    factor: float = 1.0

    def observe(self, kl: float) -> None:
        """The steps on one collection have moved the policy by ``kl`` nats a token."""
        if self.target is None or not math.isfinite(kl):
            return
        change = MOST_UP if kl <= 0 else min(max(math.sqrt(AIM * self.target / kl), MOST_DOWN), MOST_UP)
        self.factor = min(max(self.factor * change, LEAST), 1.0)
