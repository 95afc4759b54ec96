"""The preference pairs of NAT's DPO trajectories."""

from __future__ import annotations

import pytest
from nat.data_models.finetuning import DPOItem, EpisodeItem, EpisodeItemRole, Trajectory

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.preferences import has_preferences, preference_trajectories

ITEMS = [DPOItem(prompt=f"{n}?", chosen_response="yes", rejected_response="no") for n in range(3)]
WRONG = Trajectory(episode=[EpisodeItem(role=EpisodeItemRole.USER, content="x")], reward=1.0)


def test_items_of_nat_trajectories() -> None:
    rows = [[Trajectory(episode=ITEMS[:2], reward=1.0)], [], [Trajectory(episode=ITEMS[2:], reward=0.5)]]
    found = preference_trajectories(rows)
    assert [item for trajectory in found for item in trajectory.items] == ITEMS
    assert [(each.group, each.position, each.name) for each in found] == [
        (0, 0, "trajectory 0 of group 0"),
        (2, 0, "trajectory 0 of group 2"),
    ]
    with pytest.raises(DataError, match=r"trajectory 1 of group 0, item 0: an item with a role \(`user`\)"):
        preference_trajectories([[*rows[0], WRONG]])
    with pytest.raises(DataError, match="trajectory 0 of group 0: the episode is empty"):
        preference_trajectories([[Trajectory(episode=[], reward=1.0)]])


def test_one_pair_makes_a_collection_one_of_preferences() -> None:
    assert has_preferences([[WRONG], [Trajectory(episode=ITEMS[:1], reward=1.0)]])
    assert not has_preferences([[WRONG], []])
