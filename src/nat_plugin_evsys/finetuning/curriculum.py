"""Curriculum learning, as the fields of NAT's ``CurriculumLearningConfig`` document it.

Of an epoch's trajectory groups, in this order:

1. groups whose rewards differ by less than ``min_reward_diff`` are dropped (they carry no learning signal);
2. of the others, the easiest ``current_percentile`` by mean reward stay (the hardest, with ``sort_ascending``);
3. each remaining group keeps ``random_subsample`` of its trajectories, and at least two if it has two,
   because a lone trajectory has nothing to be compared with.

The percentile is a function of the epoch alone: ``initial_percentile`` plus ``increment_percentile`` for every
``expansion_interval`` epochs that have passed, at most 1. The subsample is a function of seed, epoch and group.
So a resumed run continues exactly like one that never stopped.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nat.data_models.finetuning import CurriculumLearningConfig, Trajectory, TrajectoryCollection

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.trajectories import num_calls

ROW_ID_KEY = "row_id"
"""Key of ``Trajectory.metadata`` that names the dataset row; groups without it are known by their position."""

ROLLOUT_ID_KEY = "rollout_id"
"""Key of ``Trajectory.metadata`` that names the rollout."""

_ROUNDING = 1e-9
"""0.3 - 0.2 is a difference of 0.1, and 30% of 10 groups are 3 groups, whatever binary floats make of them."""


@dataclass(slots=True)
class Selection:
    """The part of an epoch that the curriculum keeps.

    Attributes:
        collection: the trajectories to train on; groups keep their order, and so do the trajectories within one.
        dropped_calls: reason -> calls in the trajectories left out.
        dropped_trajectories: reason -> trajectories left out.
        reasons: why each trajectory was left out, by its rollout id (``Trajectory.metadata["rollout_id"]``).
    """

    collection: TrajectoryCollection
    dropped_calls: Counter[DropReason] = field(default_factory=Counter)
    dropped_trajectories: Counter[DropReason] = field(default_factory=Counter)
    reasons: dict[str, DropReason] = field(default_factory=dict)

    def drop(self, reason: DropReason, trajectories: list[Trajectory]) -> None:
        """Count trajectories that are left out."""
        if trajectories:
            self.dropped_trajectories[reason] += len(trajectories)
            self.dropped_calls[reason] += sum(map(num_calls, trajectories))
            self.reasons |= {str((item.metadata or {}).get(ROLLOUT_ID_KEY)): reason for item in trajectories}


class Curriculum:
    """Chooses the trajectories of each epoch.

    Raises:
        ConfigError: a field has a value that its documentation does not allow.
    """

    def __init__(self, config: CurriculumLearningConfig, seed: int = 0) -> None:
        _check(config)
        self.config = config
        self.seed = seed
        self._percentile = config.initial_percentile
        self._last_expansion = -1
        self._total_groups = 0
        self._included_groups: list[Any] = []

    def percentile(self, epoch: int) -> float:
        """Share of the groups to include in ``epoch`` (counted from 0)."""
        config = self.config
        return min(1.0, config.initial_percentile + config.increment_percentile * self._expansions(epoch))

    def last_expansion(self, epoch: int) -> int:
        """The epoch up to ``epoch`` in which the curriculum last grew; -1 before the first growth, as NAT has it."""
        expansions = self._expansions(epoch)
        return expansions * self.config.expansion_interval if expansions else -1

    def select(self, collection: TrajectoryCollection, epoch: int) -> Selection:
        """The trajectories to train on in ``epoch`` (counted from 0), and what was left out, by reason.

        Raises:
            DataError: a reward is not a finite number.
        """
        groups = [group for group in collection.trajectories if group]
        for group in groups:
            _check_rewards(group)
        kept = Selection(TrajectoryCollection(trajectories=[], run_id=collection.run_id))
        chosen = self._choose(groups, epoch, kept) if self.config.enabled else list(range(len(groups)))
        for index in chosen:
            group = groups[index]
            if self.config.enabled and self.config.random_subsample is not None:
                group = self._subsample(group, f"{self.seed}/{epoch}/{_row_id(group, index)}", kept)
            kept.collection.trajectories.append(group)
        self._percentile = self.percentile(epoch)
        self._last_expansion = self.last_expansion(epoch)
        self._total_groups = len(groups)
        self._included_groups = [_row_id(groups[index], index) for index in chosen]
        return kept

    def state(self) -> dict[str, Any]:
        """The state under the keys of NAT's ``Trainer.get_curriculum_state()``; JSON-ready."""
        return {
            "current_percentile": self._percentile,
            "last_expansion_epoch": self._last_expansion,
            "total_groups": self._total_groups,
            "included_groups": list(self._included_groups),
            "config": self.config.model_dump(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a ``state()``. A run that has not started has an empty one."""
        self._percentile = float(state.get("current_percentile", self.config.initial_percentile))
        self._last_expansion = int(state.get("last_expansion_epoch", -1))
        self._total_groups = int(state.get("total_groups", 0))
        self._included_groups = list(state.get("included_groups", []))

    def _expansions(self, epoch: int) -> int:
        """How often the curriculum has grown by ``epoch``; it cannot grow beyond all groups."""
        config = self.config
        needed = math.ceil((1.0 - config.initial_percentile) / config.increment_percentile - _ROUNDING)
        return min(max(epoch, 0) // config.expansion_interval, max(needed, 0))

    def _choose(self, groups: list[list[Trajectory]], epoch: int, kept: Selection) -> list[int]:
        """Indices of the groups that stay, in their order in the dataset."""
        telling = []
        for index, group in enumerate(groups):
            rewards = [trajectory.reward for trajectory in group]
            if max(rewards) - min(rewards) < self.config.min_reward_diff - _ROUNDING:
                kept.drop(DropReason.CURRICULUM_MIN_REWARD_DIFF, group)
            else:
                telling.append(index)
        sign = 1 if self.config.sort_ascending else -1
        telling.sort(key=lambda index: sign * _mean_reward(groups[index]))
        wanted = max(1, math.ceil(self.percentile(epoch) * len(telling) - _ROUNDING))
        for index in telling[wanted:]:
            kept.drop(DropReason.CURRICULUM_PERCENTILE, groups[index])
        return sorted(telling[:wanted])

    def _subsample(self, group: list[Trajectory], seed: str, kept: Selection) -> list[Trajectory]:
        size = min(len(group), max(2, math.floor((self.config.random_subsample or 1.0) * len(group) + 0.5)))
        stay = set(random.Random(seed).sample(range(len(group)), size))
        left_out = [item for index, item in enumerate(group) if index not in stay]
        kept.drop(DropReason.CURRICULUM_SUBSAMPLE, left_out)
        return [item for index, item in enumerate(group) if index in stay]


def _check(config: CurriculumLearningConfig) -> None:
    name = "finetuning.curriculum_learning"
    fraction = config.random_subsample
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise ConfigError(
            f"{name}.random_subsample is {fraction}; it is the fraction of each group's trajectories to keep: "
            "set it above 0 and up to 1, or leave it out"
        )
    if not 0.0 <= config.min_reward_diff < math.inf:
        raise ConfigError(f"{name}.min_reward_diff is {config.min_reward_diff}; set it to 0 or a positive number")


def _check_rewards(group: list[Trajectory]) -> None:
    for trajectory in group:
        if not math.isfinite(trajectory.reward):
            raise DataError(
                f"dataset row {_row_id(group, '?')}: a trajectory's reward is {trajectory.reward}; "
                "the evaluator must give a finite number"
            )


def _mean_reward(group: list[Trajectory]) -> float:
    return math.fsum(trajectory.reward for trajectory in group) / len(group)


def _row_id(group: list[Trajectory], default: Any) -> Any:
    """The dataset row's id, or ``default`` for trajectories without one."""
    value = (group[0].metadata or {}).get(ROW_ID_KEY)
    return default if value is None else value
