"""Intervals of mean rewards against what is known of them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nat_plugin_evsys.report.intervals import change_interval, mean_interval


def test_wilsons_interval_of_none_of_sixteen_and_of_half() -> None:
    # R: prop.test(0, 16, correct = FALSE)$conf.int and prop.test(8, 16, correct = FALSE)$conf.int
    none, half = mean_interval([0.0] * 16), mean_interval([0.0, 1.0] * 8)
    assert none is not None
    assert half is not None
    assert (none.mean, none.low, none.high) == pytest.approx((0.0, 0.0, 0.19361), abs=1e-5)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.279996, 0.720004), abs=1e-5)


def test_the_bootstrap_is_near_the_normal_interval_where_that_holds() -> None:
    chance = random.Random(0)
    values = [chance.gauss(0.5, 0.2) for _ in range(400)]
    found = mean_interval(values)
    assert found is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
    assert found.low < found.mean < found.high


def test_the_change_is_paired() -> None:
    before = [float(row) for row in range(50)]
    found = change_interval(before, [reward + 0.5 for reward in before])
    assert found is not None
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((0.5, 0.5, 0.5, 50))


def test_the_change_of_ones_and_zeros_is_agrestis_and_mins() -> None:
    # 12 of 40 rows got better, 2 worse: (10 ± 1.96 sqrt(15 - 10^2 / 42)) / 42
    before = [0.0] * 12 + [1.0] * 2 + [0.0] * 26
    after = [1.0] * 12 + [0.0] * 2 + [0.0] * 26
    found = change_interval(before, after)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.07236, 0.40383), abs=1e-4)
    every = change_interval([0.0] * 16, [1.0] * 16)
    assert every is not None
    assert (every.mean, every.high) == (1.0, 1.0)
    assert 0.6 < every.low < 0.8  # sixteen rows of sixteen are no certainty


def test_it_is_the_same_every_time() -> None:
    values = [0.1, 0.4, 0.4, 0.9]
    assert mean_interval(values) == mean_interval(values)


def test_nothing_has_no_interval() -> None:
    assert mean_interval([]) is None
    assert change_interval([], []) is None


def test_the_same_rewards_are_resampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [row / 7 for row in range(30)]
    first = mean_interval(values)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: pytest.fail("resampled again"))
    assert mean_interval(list(values)) == first
