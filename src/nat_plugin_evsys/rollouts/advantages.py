"""Advantages of the trajectories of one group."""

from __future__ import annotations

import math
from typing import Literal

from nat_plugin_evsys.errors import DataError

AdvantageMethod = Literal["group_mean", "group_mean_std", "leave_one_out", "reward"]

METHODS = ("group_mean", "group_mean_std", "leave_one_out", "reward")

ZERO_SPREAD = 1e-12
"""Rewards of a group that differ by no more than this are equal."""


def has_zero_variance(rewards_G: list[float]) -> bool:
    """True when the rewards of a group are equal (within 1e-12), so that no trajectory is better than another."""
    return max(rewards_G) - min(rewards_G) <= ZERO_SPREAD


def group_advantages(rewards_G: list[float], method: AdvantageMethod) -> list[float]:
    """Advantage of each trajectory of one group; each has one vote, however many calls it made.

    ``group_mean``: ``A_g = r_g - mean(r)``, as Dr. GRPO (arXiv 2503.20783). ``group_mean_std``: that over the
    population standard deviation, as GRPO (arXiv 2402.03300, eq. 3). ``leave_one_out``: ``r_g`` minus the mean of the
    *other* rewards, ``G / (G - 1)`` times ``group_mean``, as RLOO (arXiv 2402.14740, eq. 8): that baseline does not
    depend on the trajectory, so the gradient has no bias. ``reward``: ``A_g = r_g``.

    Args:
        rewards_G: rewards, length G.

    Returns:
        advantages_G, length G; all zero for a group method where the rewards have no spread.

    Raises:
        DataError: no rewards, or an unknown method.
    """
    if not rewards_G:
        raise DataError("an empty group has no advantages")
    if method not in METHODS:
        raise DataError(f"unknown advantage method `{method}`; known: {', '.join(METHODS)}")
    if method == "reward":
        return list(rewards_G)
    if has_zero_variance(rewards_G):
        return [0.0] * len(rewards_G)
    mean = math.fsum(rewards_G) / len(rewards_G)
    centred_G = [reward - mean for reward in rewards_G]
    if method == "group_mean":
        return centred_G
    if method == "leave_one_out":
        return [value * len(rewards_G) / (len(rewards_G) - 1) for value in centred_G]
    std = math.sqrt(math.fsum(value * value for value in centred_G) / len(centred_G))
    return [value / std for value in centred_G]
