"""NAT's DPO trajectories: episodes of preference pairs instead of items with roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nat.data_models.finetuning import DPOItem, EpisodeItem, Trajectory

from nat_plugin_evsys.calls import CallKey
from nat_plugin_evsys.errors import DataError

PAIRED_CALLS_KEY = "paired_calls"
"""Key of ``Trajectory.metadata``: ``(call_id, index)`` of the recorded calls whose replies the pairs are made of."""

PAIRED_ATTEMPTS_KEY = "paired_attempts"
"""Key of ``Trajectory.metadata``: how many recorded attempts the pairs are made of; 1 unless given."""


@dataclass(frozen=True, slots=True)
class PreferenceTrajectory:
    """The preference items of one trajectory (at least one), and where it stands in its collection.

    Attributes:
        calls, attempts: what the pairs are made of, if they are recorded.
    """

    group: int
    position: int
    items: list[DPOItem]
    calls: tuple[CallKey, ...] = ()
    attempts: int = 1

    @property
    def name(self) -> str:
        """Its name in messages."""
        return _name(self.group, self.position)


def has_preferences(rows: Sequence[Sequence[Trajectory]]) -> bool:
    """True when any item of any trajectory is a preference pair."""
    return any(isinstance(item, DPOItem) for row in rows for trajectory in row for item in trajectory.episode)


def preference_trajectories(rows: Sequence[Sequence[Trajectory]]) -> list[PreferenceTrajectory]:
    """The preference items of every trajectory of a collection, in its order.

    Raises:
        DataError: a trajectory is empty or has an item that is not a preference pair; names it.
    """
    found = []
    for group, row in enumerate(rows):
        for position, trajectory in enumerate(row):
            episode: Sequence[EpisodeItem | DPOItem] = trajectory.episode  # NAT's list of either kind
            items = []
            for number, item in enumerate(episode):
                if not isinstance(item, DPOItem):
                    raise DataError(
                        f"{_name(group, position)}, item {number}: an item with a role (`{item.role.value}`), but "
                        "other items of the collection are DPO preference pairs; submit each kind on its own"
                    )
                items.append(item)
            if not items:
                raise DataError(f"{_name(group, position)}: the episode is empty; it must hold preference pairs")
            metadata = trajectory.metadata or {}
            calls = tuple((str(name), int(index)) for name, index in metadata.get(PAIRED_CALLS_KEY, ()))
            attempts = int(metadata.get(PAIRED_ATTEMPTS_KEY, 1))
            found.append(PreferenceTrajectory(group, position, items, calls, attempts))
    return found


def _name(group: int, position: int) -> str:
    return f"trajectory {position} of group {group}"
