"""The curriculum, against what NAT's CurriculumLearningConfig documents of each field."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nat.data_models.finetuning import (
    CurriculumLearningConfig,
    EpisodeItem,
    EpisodeItemRole,
    Trajectory,
    TrajectoryCollection,
)
from nat.finetuning.interfaces.finetuning_runner import Trainer

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.finetuning.curriculum import Curriculum

EPISODE = [EpisodeItem(role=EpisodeItemRole.USER, content="2+2?")]


def trajectory(reward: float, row: Any = None, calls: int = 1) -> Trajectory:
    metadata = {"row_id": row, "calls": [{"call_id": str(number)} for number in range(calls)]}
    return Trajectory(episode=EPISODE, reward=reward, metadata=metadata)


def collection(*rewards_G: list[float], calls: int = 1) -> TrajectoryCollection:
    groups = [[trajectory(reward, f"row{g}", calls) for reward in rewards] for g, rewards in enumerate(rewards_G)]
    return TrajectoryCollection(trajectories=groups, run_id="run")


def spread(mean: float) -> list[float]:
    """A group with this mean reward and a difference of 0.2."""
    return [mean - 0.1, mean + 0.1]


def curriculum(seed: int = 0, **values: Any) -> Curriculum:
    return Curriculum(CurriculumLearningConfig(enabled=True, **values), seed)


def rows(kept: TrajectoryCollection) -> list[str]:
    return [(group[0].metadata or {})["row_id"] for group in kept.trajectories]


def apply(
    subject: Curriculum, trajectories: TrajectoryCollection, epoch: int
) -> tuple[TrajectoryCollection, Counter[DropReason]]:
    """What is trained on, and reason -> calls left out."""
    selection = subject.select(trajectories, epoch)
    return selection.collection, selection.dropped_calls


TEN = collection(*(spread(mean / 10) for mean in (5, 9, 1, 8, 2, 7, 3, 6, 4, 10)))
"""Ten groups; the easiest are row9 (1.0), row1 (0.9), row3 (0.8)."""


def test_starts_with_the_easiest_groups_in_dataset_order() -> None:
    kept, dropped = apply(curriculum(initial_percentile=0.3), TEN, 0)
    assert rows(kept) == ["row1", "row3", "row9"]
    assert dropped == Counter({"curriculum_percentile": 14})


def test_sort_ascending_starts_with_the_hardest() -> None:
    kept, _ = apply(curriculum(initial_percentile=0.3, sort_ascending=True), TEN, 0)
    assert rows(kept) == ["row2", "row4", "row6"]


@pytest.mark.parametrize(
    ("epoch", "groups", "last_expansion"),
    [(0, 3, -1), (4, 3, -1), (5, 5, 5), (9, 5, 5), (10, 7, 10), (15, 9, 15), (20, 10, 20), (25, 10, 20), (99, 10, 20)],
)
def test_grows_every_expansion_interval_epochs_up_to_all_groups(epoch: int, groups: int, last_expansion: int) -> None:
    subject = curriculum(initial_percentile=0.3, increment_percentile=0.2, expansion_interval=5)
    kept, _ = apply(subject, TEN, epoch)
    assert len(kept.trajectories) == groups
    assert subject.state()["last_expansion_epoch"] == last_expansion
    assert subject.state()["current_percentile"] == pytest.approx(min(1.0, 0.3 + 0.2 * (epoch // 5)))


def test_min_reward_diff_leaves_out_groups_without_a_signal_before_the_percentile_counts() -> None:
    epoch = collection([1.0, 1.0], [0.9, 0.8], [0.2, 0.3], [0.0, 0.05], calls=3)
    kept, dropped = apply(curriculum(initial_percentile=0.5, min_reward_diff=0.1), epoch, 0)
    assert rows(kept) == ["row1"]
    assert dropped == Counter({"curriculum_min_reward_diff": 12, "curriculum_percentile": 6})


def test_a_difference_of_exactly_min_reward_diff_is_included() -> None:
    assert 0.3 - 0.2 < 0.1  # in binary floats
    kept, _ = apply(curriculum(initial_percentile=1.0, min_reward_diff=0.1), collection([0.2, 0.3]), 0)
    assert rows(kept) == ["row0"]


def test_one_group_is_filtered_like_any_other() -> None:
    kept, dropped = apply(curriculum(), collection([0.5, 0.5]), 0)
    assert kept.trajectories == []
    assert dropped == Counter({"curriculum_min_reward_diff": 2})


def test_random_subsample_thins_every_group_and_keeps_two() -> None:
    epoch = collection([0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 0], [0, 1], calls=2)
    subject = curriculum(initial_percentile=1.0, random_subsample=0.5)
    kept, dropped = apply(subject, epoch, 0)
    assert [len(group) for group in kept.trajectories] == [4, 2, 2]
    assert dropped == Counter({"curriculum_subsample": 10})
    again, _ = apply(curriculum(initial_percentile=1.0, random_subsample=0.5), epoch, 0)
    assert again == kept


def test_random_subsample_differs_between_epochs_and_seeds() -> None:
    epoch = collection([float(number) for number in range(32)])

    def chosen(seed: int, number: int) -> list[float]:
        kept, _ = apply(curriculum(seed, initial_percentile=1.0, random_subsample=0.5), epoch, number)
        return [item.reward for item in kept.trajectories[0]]

    assert chosen(0, 0) == chosen(0, 0)
    assert chosen(0, 0) != chosen(0, 1)
    assert chosen(0, 0) != chosen(1, 0)


def test_disabled_changes_nothing() -> None:
    epoch = collection([1.0, 1.0], [0.0, 1.0])
    config = CurriculumLearningConfig(enabled=False, initial_percentile=0.1, random_subsample=0.5)
    kept, dropped = apply(Curriculum(config), epoch, 0)
    assert kept == epoch
    assert not dropped


@pytest.mark.parametrize("value", [7.0, 0.0, -0.5, math.nan])
def test_random_subsample_outside_of_0_to_1_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="random_subsample"):
        curriculum(random_subsample=value)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_min_reward_diff_that_no_group_or_every_group_meets_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="min_reward_diff"):
        curriculum(min_reward_diff=value)


def test_a_reward_that_is_not_finite_is_refused_by_row() -> None:
    with pytest.raises(DataError, match="row1"):
        apply(curriculum(), collection([0.0, 1.0], [0.0, math.nan]), 0)


def test_state_has_nats_keys_names_rows_and_survives_json() -> None:
    subject = curriculum(initial_percentile=0.3, expansion_interval=2)
    apply(subject, TEN, 3)
    state = subject.state()

    class Plain(Trainer):
        run_epoch = run = get_metrics = cleanup = log_progress = None  # type: ignore[assignment]

    plain = Plain.__new__(Plain)
    plain.curriculum_config = subject.config
    plain._curriculum_state = dict.fromkeys(["current_percentile", "last_expansion_epoch", "total_groups"], 0) | {
        "included_groups": set()
    }
    assert state.keys() == plain.get_curriculum_state().keys()
    assert state["included_groups"] == ["row1", "row3", "row5", "row7", "row9"]
    assert state["total_groups"] == 10

    resumed = curriculum(initial_percentile=0.3, expansion_interval=2)
    resumed.load_state(json.loads(json.dumps(state)))
    assert resumed.state() == state
    assert apply(resumed, TEN, 4) == apply(subject, TEN, 4)


rewards = st.floats(min_value=-2, max_value=2, allow_nan=False)
groups = st.lists(st.lists(rewards, max_size=6), max_size=8)


@settings(max_examples=200, deadline=None)
@given(
    rewards_G=groups,
    epoch=st.integers(0, 40),
    initial=st.floats(0.01, 1.0),
    increment=st.floats(0.01, 1.0),
    interval=st.integers(1, 7),
    fraction=st.none() | st.floats(0.01, 1.0),
    difference=st.floats(0.0, 1.0),
    ascending=st.booleans(),
)
def test_whatever_the_settings_nothing_vanishes(
    rewards_G: list[list[float]],
    epoch: int,
    initial: float,
    increment: float,
    interval: int,
    fraction: float | None,
    difference: float,
    ascending: bool,
) -> None:
    subject = curriculum(
        initial_percentile=initial,
        increment_percentile=increment,
        expansion_interval=interval,
        random_subsample=fraction,
        min_reward_diff=difference,
        sort_ascending=ascending,
    )
    before = collection(*rewards_G, calls=3)
    selection = subject.select(before, epoch)
    kept = sum(len(group) for group in selection.collection.trajectories)
    assert kept + selection.dropped_trajectories.total() == sum(len(group) for group in rewards_G)
    assert selection.dropped_calls == Counter({k: 3 * n for k, n in selection.dropped_trajectories.items()})
    assert subject.percentile(epoch) <= subject.percentile(epoch + 1) <= 1.0
    for group in selection.collection.trajectories:
        assert len(group) >= min(2, len(rewards_G[int(str((group[0].metadata or {})["row_id"])[3:])]))


@settings(max_examples=100, deadline=None)
@given(rewards_G=st.lists(st.lists(rewards, min_size=1, max_size=4), min_size=1, max_size=8), share=st.floats(0.01, 1))
def test_no_group_left_out_is_easier_than_one_that_stays(rewards_G: list[list[float]], share: float) -> None:
    before = collection(*rewards_G)
    kept, _ = apply(curriculum(initial_percentile=share, min_reward_diff=0.0), before, 0)
    means = {f"row{g}": math.fsum(group) / len(group) for g, group in enumerate(rewards_G)}
    stay = set(rows(kept))
    assert len(stay) >= share * len(means) - 1e-6
    assert min(means[row] for row in stay) >= max((means[row] for row in means.keys() - stay), default=-math.inf)
