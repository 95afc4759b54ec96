"""Limits the step size: the learning rate rises over the first steps, and falls while epochs move the policy too far or
few groups of a step are left to learn from.

Adam moves each weight by about the learning rate, whatever that does to the policy. Its first steps are the largest:
the moments are those of a few gradients, and in RL the few rewards of an untrained policy are one sample of what may
earn some. Step k (from 1) of a warm-up over W runs at ``k / W`` of the rate. ``warmup_of`` has the W of a NAT trainer.

The KL of the policy after an epoch's steps to the one that sampled grows with the square of the rate, so that

    factor <- min(1, factor * clamp(sqrt(aim / KL), 1/4, 3/2)),   aim = target / 2

brings it to the aim within a few epochs, and ``learning_rate`` is the highest rate that is ever used. Source: the
adaptive penalty of PPO (arXiv 1707.06347, section 4) with the rate in place of the penalty, as in rsl_rl (arXiv
2109.11978, "adaptive" schedule).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal

from nat_plugin_evsys.runtime import defaults

logger = logging.getLogger(__name__)

LrScaling = Literal["unsolved", "none"]

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
        warmup: optimizer steps of the warm-up; 0 for none.
        taken: optimizer steps so far.
        warned: whether it was said that a service does not let steps see the KL.
    """

    target: float | None = None
    factor: float = 1.0
    warmup: int = 0
    taken: int = 0
    warned: bool = False

    @property
    def next(self) -> float:
        """What the rate of the next step is multiplied by."""
        return self.factor * min((self.taken + 1) / max(self.warmup, 1), 1.0)

    def warn_unseen(self) -> None:
        """Say once that a step could not see how far the ones before it have moved the policy."""
        if not self.warned:
            logger.warning(
                "target_kl ends no epoch early: forward_backward returned neither `kl_v2:mean` nor `logprobs` of the "
                "trained tokens. kl_moved is measured after an epoch's last step, and the learning rate follows it"
            )
        self.warned = True

    def observe(self, kl: float) -> None:
        """The steps on one collection have moved the policy by ``kl`` nats a token."""
        if self.target is None or not math.isfinite(kl):
            return
        change = MOST_UP if kl <= 0 else min(max(math.sqrt(AIM * self.target / kl), MOST_DOWN), MOST_UP)
        self.factor = min(max(self.factor * change, LEAST), 1.0)


def unsolved_factor(places: int, with_signal: int, silent: int, solved: int) -> float:
    """``sqrt((N - k) / N)``: what a step's rate is multiplied by where solved groups leave k of its N places empty.

    Adam moves the weights by the rate, however few groups the gradient is of. The square root is its scaling rule for
    smaller batches (arXiv 2205.10287). Groups that all failed are not in k: there the policy has nothing to lose.

    Args:
        places: groups of a full step, N.
        with_signal: groups of this step that have an advantage.
        silent: groups of the collection that have none.
        solved: of these, those whose trajectories all earned the collection's highest reward. It is not known which
            groups a step misses, so k is their share of its empty places, and never more than there are.
    """
    empty = (places - with_signal) * solved / max(silent, 1)
    missing = max(min(empty, solved, places - 1), 0)
    return math.sqrt((places - missing) / places)


def warmup_of(learning_rate: float) -> int:
    """Steps of the warm-up to that rate: it rises by ``LR_RISE`` in each, but over ``LR_WARMUP_AT_MOST`` at most."""
    steps = math.ceil(round(learning_rate / defaults.LR_RISE, 6))  # rounded, so that a multiple stays one
    return min(steps, defaults.LR_WARMUP_AT_MOST)
