"""Advantages of the trajectories of one group, and of the calls of each.

A trajectory of K calls with the reward r, and a step reward s_k for each call where the evaluator gives them (else 0),
has at call k (from 0) the return, discounted by g,

    R_k = s_k + g s_(k+1) + ... + g^(K-1-k) (s_(K-1) + r)

Without step rewards and with g = 1 that is r for every call. The advantage of a call compares its return with those of
the group's other trajectories at the same call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from nat_plugin_evsys.errors import DataError

AdvantageMethod = Literal["group_mean", "group_mean_std", "leave_one_out", "maxrl", "reward"]

METHODS = get_args(AdvantageMethod)

FailedGroups = Literal["drop", "batch_mean"]

ZERO_SPREAD = 1e-12
"""Rewards of a group that differ by no more than this are equal."""


def has_zero_variance(rewards_G: Sequence[float]) -> bool:
    """True when the rewards of a group are equal (within 1e-12), so that no trajectory is better than another."""
    return max(rewards_G) - min(rewards_G) <= ZERO_SPREAD


def group_advantages(rewards_G: list[float], method: AdvantageMethod) -> list[float]:
    """Advantage of each trajectory of one group; each has one vote, however many calls it made.

    ``group_mean``: ``A_g = r_g - mean(r)``, as Dr. GRPO (arXiv 2503.20783). ``group_mean_std``: that over the
    population standard deviation, as GRPO (arXiv 2402.03300, eq. 3). ``leave_one_out``: ``r_g`` minus the mean of the
    *other* rewards, ``G / (G - 1)`` times ``group_mean``, as RLOO (arXiv 2402.14740, eq. 8): that baseline does not
    depend on the trajectory, so the gradient is unbiased. ``maxrl``: ``group_mean`` over the mean of the rewards, as
    MaxRL (arXiv 2602.02710): with rewards of 0 and 1 it raises the mean *logarithm* of the rows' success rates, so that
    a rare success weighs more than one of many. If the lowest reward is negative, the mean is counted from that one, so
    that rewards of -1 and 1 have the advantages of 0 and 1. ``reward``: ``A_g = r_g``.

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
    mean = _mean(rewards_G)
    return _scaled([reward - mean for reward in rewards_G], rewards_G, method)


def call_advantages(
    rewards_G: Sequence[float],
    calls_G: Sequence[int],
    method: AdvantageMethod,
    *,
    step_rewards_G: Sequence[Sequence[float] | None] | None = None,
    discount: float = 1.0,
) -> list[list[float]]:
    """Advantage of each call of each trajectory of one group.

    Call k of a trajectory is compared, by ``method``, with the returns at call k of those that have one. Where it alone
    has one, that is its return less the group's mean return at the first call, over what ``maxrl`` or
    ``group_mean_std`` divides the returns at the first call by (1 if these are equal).

    Args:
        rewards_G: rewards, length G.
        calls_G: number of calls of each trajectory.
        step_rewards_G: a reward of each call; None for a trajectory (or all) without.
        discount: g, above 0 and up to 1.

    Returns:
        one list per trajectory, one value per call.

    Raises:
        DataError: no rewards, an unknown method, or not one step reward per call.
    """
    if discount == 1.0 and not any(step_rewards_G or ()):
        whole = group_advantages(list(rewards_G), method)
        return [[value] * calls for value, calls in zip(whole, calls_G, strict=True)]
    steps_G = step_rewards_G or [None] * len(rewards_G)
    returns_G = [
        call_returns(reward, calls, steps, discount)
        for reward, calls, steps in zip(rewards_G, calls_G, steps_G, strict=True)
    ]
    advantages_G: list[list[float]] = [[] for _ in returns_G]
    first = [returns[0] for returns in returns_G if returns]
    for turn in range(max(calls_G, default=0)):
        there = [index for index, returns in enumerate(returns_G) if len(returns) > turn]
        values = [returns_G[index][turn] for index in there]
        if len(values) == 1 and len(first) > 1 and method != "reward":
            divisor = 1.0 if has_zero_variance(first) else _divisor(first, method)
            compared = [(values[0] - _mean(first)) / divisor]
        else:
            compared = group_advantages(values, method)
        for index, value in zip(there, compared, strict=True):
            advantages_G[index].append(value)
    return advantages_G


def failed_advantage(reward: float, batch: Sequence[float], method: AdvantageMethod) -> float:
    """Advantage of the trajectories of a group that all earned ``reward``, where that is below a batch's mean; else 0.

    Within such a group none is better than another. Beside the other groups all are worse: their advantage is what
    ``method`` gives for their reward among all of the batch's, whose mean is the baseline of REINFORCE++ (arXiv
    2501.03262). NGRPO (arXiv 2509.18851) and LENS (arXiv 2510.08696) push groups without a success away from what
    they sampled by other formulas.

    Args:
        batch: the rewards of all trajectories of all groups, this one's included.
    """
    below = reward - _mean(batch)
    if below >= -ZERO_SPREAD:
        return 0.0
    return _scaled([below], batch, method)[0]


def call_returns(reward: float, calls: int, step_rewards: Sequence[float] | None, discount: float) -> list[float]:
    """``R_k`` of each call, by the module's formula.

    Raises:
        DataError: there is not one step reward per call, or one is not finite.
    """
    steps = [0.0] * calls if step_rewards is None else list(step_rewards)
    if len(steps) != calls or not all(math.isfinite(value) for value in steps):
        raise DataError(f"step rewards {steps} for {calls} calls; give one finite number for each call")
    returns: list[float] = []
    later = 0.0
    for position, step in enumerate(reversed(steps)):
        later = step + (reward if position == 0 else discount * later)
        returns.append(later)
    return returns[::-1]


def _mean(rewards_G: Sequence[float]) -> float:
    return math.fsum(rewards_G) / len(rewards_G)


def _scaled(centred: Sequence[float], among: Sequence[float], method: AdvantageMethod) -> list[float]:
    """The advantages of rewards less the mean of ``among``, by a method that compares."""
    if method == "leave_one_out":
        return [value * len(among) / (len(among) - 1) for value in centred]
    divisor = _divisor(among, method)
    return [value / divisor for value in centred]


def _divisor(rewards_G: Sequence[float], method: AdvantageMethod) -> float:
    """What a method divides the rewards less their mean by."""
    mean = _mean(rewards_G)
    if method == "maxrl":
        return mean - min(0.0, *rewards_G)
    if method == "group_mean_std":
        return math.sqrt(math.fsum((reward - mean) * (reward - mean) for reward in rewards_G) / len(rewards_G))
    return 1.0
