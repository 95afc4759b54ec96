import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.advantages import (
    AdvantageMethod,
    call_advantages,
    call_returns,
    failed_advantage,
    group_advantages,
    has_zero_variance,
)

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9)


@given(REWARDS)
def test_methods_against_numpy(rewards_G: list[float]) -> None:
    rewards = np.asarray(rewards_G)
    assert group_advantages(rewards_G, "reward") == rewards_G
    centred = group_advantages(rewards_G, "group_mean")
    scaled = group_advantages(rewards_G, "group_mean_std")
    if has_zero_variance(rewards_G):
        assert centred == scaled == [0.0] * len(rewards_G)
        return
    np.testing.assert_allclose(centred, rewards - rewards.mean(), atol=1e-9)
    if np.ptp(rewards) > 1e-6:
        np.testing.assert_allclose(scaled, (rewards - rewards.mean()) / rewards.std(), atol=1e-5)
    assert np.std(scaled) == pytest.approx(1.0, rel=1e-6)


@given(REWARDS, st.floats(-100, 100))
def test_a_constant_changes_nothing(rewards_G: list[float], shift: float) -> None:
    moved = group_advantages([reward + shift for reward in rewards_G], "group_mean")
    np.testing.assert_allclose(moved, group_advantages(rewards_G, "group_mean"), atol=1e-9)


def test_zero_variance_is_exact_or_within_1e_12() -> None:
    assert has_zero_variance([0.1, 0.1, 0.1])
    assert has_zero_variance([0.5, 0.5 + 5e-13])
    assert not has_zero_variance([0.5, 0.5 + 5e-12])
    assert has_zero_variance([3.0])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_leave_one_out_compares_with_the_mean_of_the_others(rewards_G: list[float]) -> None:
    found = group_advantages(rewards_G, "leave_one_out")
    if has_zero_variance(rewards_G):
        assert found == [0.0] * len(rewards_G)
        return
    others = [np.mean([r for j, r in enumerate(rewards_G) if j != i]) for i in range(len(rewards_G))]
    np.testing.assert_allclose(found, np.asarray(rewards_G) - np.asarray(others), atol=1e-9)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9), st.sampled_from(["group_mean", "leave_one_out", "maxrl"]))
def test_a_failed_group_is_compared_with_the_batch_as_with_a_group(batch: list[float], method: AdvantageMethod) -> None:
    for reward, advantage in zip(batch, group_advantages(batch, method), strict=True):
        assert failed_advantage(reward, batch, method) == pytest.approx(min(advantage, 0.0), rel=1e-6, abs=1e-9)


def test_the_advantage_of_a_failed_group_by_hand() -> None:
    batch = [0.0, 0.0, 0.0, 1.0]
    assert failed_advantage(0.0, batch, "group_mean_std") == pytest.approx(-0.25 / 0.75**0.5 / 0.25**0.5)
    assert failed_advantage(0.0, batch, "group_mean") == -0.25
    assert failed_advantage(1.0, batch, "group_mean_std") == 0.0, "it did not fail"
    assert failed_advantage(0.0, [0.0] * 4, "group_mean_std") == 0.0, "there is nothing better to compare with"
    assert failed_advantage(0.1, [0.1, 0.1, 0.1, 0.0, 0.2], "group_mean_std") == 0.0, "rounding is no failure"


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9))
def test_maxrl_divides_by_the_mean(rewards_G: list[float]) -> None:
    found = group_advantages(rewards_G, "maxrl")
    if has_zero_variance(rewards_G):
        assert found == [0.0] * len(rewards_G)
        return
    np.testing.assert_allclose(found, np.asarray(rewards_G) / np.mean(rewards_G) - 1, atol=1e-6)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=9), st.integers(0, 9))
def test_maxrl_of_right_and_wrong_is_the_mean_over_the_right_ones(rewards_G: list[float], seed: int) -> None:
    """MaxRL's estimator: the mean score of the successes, less that of all (arXiv 2602.02710)."""
    if has_zero_variance(rewards_G):
        return
    scores = np.random.default_rng(seed).normal(size=(len(rewards_G), 3))
    found = np.asarray(group_advantages(rewards_G, "maxrl")) @ scores / len(rewards_G)
    right = np.asarray(rewards_G) == 1.0
    np.testing.assert_allclose(found, scores[right].mean(0) - scores.mean(0), atol=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=9), st.floats(0.1, 9.0))
def test_maxrl_counts_from_the_lowest_negative_reward(rewards_G: list[float], scale: float) -> None:
    with_failure = [0.0, *rewards_G]
    moved = group_advantages([(reward - 1) * scale for reward in with_failure], "maxrl")
    np.testing.assert_allclose(moved, group_advantages(with_failure, "maxrl"), atol=1e-9)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="empty group"):
        group_advantages([], "group_mean")
    with pytest.raises(ValueError, match="unknown advantage method `rank`; known: group_mean"):
        group_advantages([1.0], "rank")  # type: ignore[arg-type]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_leave_one_out_is_the_mean_of_the_others(rewards_G: list[float]) -> None:
    if has_zero_variance(rewards_G):
        return
    others = [np.mean([r for j, r in enumerate(rewards_G) if j != i]) for i in range(len(rewards_G))]
    expected = np.asarray(rewards_G) - np.asarray(others)
    np.testing.assert_allclose(group_advantages(rewards_G, "leave_one_out"), expected, atol=1e-9)


def test_returns_by_hand() -> None:
    assert call_returns(1.0, 3, None, 1.0) == [1.0, 1.0, 1.0]
    assert call_returns(1.0, 3, None, 0.5) == [0.25, 0.5, 1.0]
    # s = 1, 2, 3 and the reward 10 at the end
    assert call_returns(10.0, 3, [1.0, 2.0, 3.0], 0.5) == [1 + 0.5 * (2 + 0.5 * 13), 2 + 0.5 * 13, 13.0]
    assert call_returns(1.0, 0, None, 0.5) == []
    for wrong in ([1.0], [1.0, float("nan")]):
        with pytest.raises(DataError, match="give one finite number for each call"):
            call_returns(1.0, 2, wrong, 1.0)


def test_calls_are_compared_with_the_same_call_of_the_others() -> None:
    same = call_advantages([1.0, 0.0], [2, 1], "group_mean")
    assert same == [[0.5, 0.5], [-0.5]]
    # Returns: [0.5, 1], [0, 0], [0.25, 0.5, 1]; the third call is the last one's alone.
    first = (0.5 + 0.0 + 0.25) / 3
    by_hand = [[0.5 - first, 1 - 0.5], [0 - first, 0 - 0.5], [0.25 - first, 0.5 - 0.5, 1 - first]]
    found = call_advantages([1.0, 0.0, 1.0], [2, 2, 3], "group_mean", discount=0.5)
    for one, other in zip(found, by_hand, strict=True):
        assert one == pytest.approx(other)
    stepped = call_advantages([0.0, 0.0], [2, 2], "group_mean", step_rewards_G=[[0.0, 1.0], None])
    assert stepped == [[0.5, 0.5], [-0.5, -0.5]]
    later = call_advantages([0.0, 0.0], [2, 2], "reward", step_rewards_G=[[1.0, 0.0], None])
    assert later == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("method", ["maxrl", "group_mean_std"])
def test_a_call_that_no_other_got_to_has_the_scale_of_the_first_calls(method: AdvantageMethod) -> None:
    first = np.asarray([0.95**2, *[0.0] * 7])
    (*_, last), *_ = call_advantages([1.0, *[0.0] * 7], [3, *[2] * 7], method, discount=0.95)
    assert last == pytest.approx((1 - first.mean()) / (first.mean() if method == "maxrl" else first.std()))


def test_maxrl_divides_a_call_that_no_other_got_to_by_the_mean_above_the_lowest_first_return() -> None:
    (*_, last), *_ = call_advantages([1.0, -1.0], [2, 1], "maxrl", discount=0.5)
    assert last == pytest.approx((1 - -0.25) / (-0.25 - -1))


@pytest.mark.parametrize("method", ["maxrl", "group_mean_std", "group_mean", "leave_one_out"])
def test_a_call_that_no_other_got_to_is_not_divided_where_the_first_returns_are_equal(method: AdvantageMethod) -> None:
    (_, last), _ = call_advantages([0.0, 0.0], [2, 1], method, step_rewards_G=[[-1.0, 1.0], None])
    assert last == 1.0
