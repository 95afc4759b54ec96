"""Confidence intervals of mean rewards, from the rewards of the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean

LEVEL = 0.95
"""Share of the intervals that hold the true mean."""

_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_RESAMPLES = 2000
_DRAWS = 4_000_000
"""Most numbers drawn for one bootstrap; more rows get fewer resamples, of which they need fewer."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the bounds of its 95 % interval.

    Attributes:
        low, high: both equal ``mean`` if there is only a single value.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(rewards: Sequence[float]) -> Interval | None:
    """The mean of rewards with its interval; None without rewards.

    Rewards that are all 0 or 1 get Wilson's score interval (Wilson 1927), which stays honest at 0 of 16; others a
    percentile bootstrap over the rows.
    """
    if not rewards:
        return None
    if set(rewards) <= {0.0, 1.0}:
        return _wilson(sum(rewards), len(rewards))
    return _bootstrap(tuple(rewards))


def change_interval(before: Sequence[float], after: Sequence[float]) -> Interval | None:
    """The mean change of rewards of the same rows with its interval; None without rows.

    Rewards that are all 0 or 1 get Agresti and Min's adjusted interval for paired proportions (Statistics in Medicine
    24, 2005), which stays honest if all rows change alike; others a percentile bootstrap over the rows.

    Args:
        before, after: reward of each row, in the same order.
    """
    changes = [new - old for old, new in zip(before, after, strict=True)]
    if not changes:
        return None
    if {*before, *after} <= {0.0, 1.0}:
        return _agresti_min(changes.count(1.0), changes.count(-1.0), len(changes))
    return _bootstrap(tuple(changes))


def _wilson(successes: float, count: int) -> Interval:
    share = successes / count
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    reach = _Z / scale * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return Interval(share, max(0.0, min(share, centre - reach)), min(1.0, max(share, centre + reach)), count)


def _agresti_min(better: int, worse: int, count: int) -> Interval:
    change = (better - worse) / count
    moved, cells = better + worse + 1, count + 2  # half a row is added to each cell of the 2 x 2 table
    centre = (better - worse) / cells
    reach = _Z * math.sqrt(moved - (better - worse) ** 2 / cells) / cells
    return Interval(change, max(-1.0, min(change, centre - reach)), min(1.0, max(change, centre + reach)), count)


@lru_cache(maxsize=4096)  # a report that is written again has the measurements of the one before
def _bootstrap(values: tuple[float, ...]) -> Interval:
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    resamples = max(200, min(_RESAMPLES, _DRAWS // len(sample)))
    rows = np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[rows].mean(axis=1), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(fmean(values), float(low), float(high), len(values))
