import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat_plugin_evsys.rollouts.advantages import group_advantages, has_zero_variance

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


def test_refusals() -> None:
    with pytest.raises(ValueError, match="empty group"):
        group_advantages([], "group_mean")
    with pytest.raises(ValueError, match="unknown advantage method `rank`; known: group_mean"):
        group_advantages([1.0], "rank")  # type: ignore[arg-type]
