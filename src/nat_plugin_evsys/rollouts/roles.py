"""The rules for the order of roles in an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from nat.data_models.finetuning import DPOItem, EpisodeItem, EpisodeItemRole, Trajectory

from nat_plugin_evsys.errors import DataError

OBSERVATIONS = frozenset({EpisodeItemRole.TOOL, EpisodeItemRole.FUNCTION, EpisodeItemRole.ENVIRONMENT})
"""What the world answers: may follow an assistant turn and other observations."""

FIRST = frozenset({EpisodeItemRole.SYSTEM, EpisodeItemRole.USER})
"""Roles that may open an episode."""


def validate_episode_order(trajectory: Trajectory, name: str) -> None:
    """Check the order of roles in a trajectory's episode.

    The rules (those of NAT's ART adapter, plus observations): the first item is system or user; the last is
    assistant; no two consecutive items have the same role, except system; tool, function and environment items are
    observations and may follow an assistant turn and each other; any other role is refused.

    Args:
        name: what to call the trajectory in the error text.

    Raises:
        DataError: (a ValueError) names the trajectory, the position, the role and the rule.
    """
    episode = trajectory.episode
    if not episode:
        raise DataError(f"{name}: the episode is empty; it must open with system or user and end with assistant")
    previous: EpisodeItemRole | None = None
    items: Sequence[EpisodeItem | DPOItem] = episode  # NAT's list of either kind
    for position, item in enumerate(items):
        if isinstance(item, DPOItem):
            raise DataError(
                f"{name}, item {position}: a DPO preference pair, but an episode of items with roles (EpisodeItem) "
                "is needed here; the evsys_trainer_adapter trains pairs when a collection holds nothing else"
            )
        _check_item(name, position, item, previous)
        previous = item.role
    if previous is not EpisodeItemRole.ASSISTANT:
        _refuse(name, len(episode) - 1, previous, "the last item of an episode must be assistant")


def _check_item(name: str, position: int, item: EpisodeItem, previous: EpisodeItemRole | None) -> None:
    role = item.role
    if role is EpisodeItemRole.OTHER:
        _refuse(name, position, role, "only system, user, assistant, tool, function and environment can be trained on")
    if previous is None:
        if role not in FIRST:
            _refuse(name, position, role, "the first item of an episode must be system or user")
    elif role in OBSERVATIONS:
        if previous is not EpisodeItemRole.ASSISTANT and previous not in OBSERVATIONS:
            rule = f"an observation must follow an assistant turn or another observation, not `{previous.value}`"
            _refuse(name, position, role, rule)
    elif role is previous and role is not EpisodeItemRole.SYSTEM:
        _refuse(name, position, role, "two consecutive items must not have the same role, except system")


def _refuse(name: str, position: int, role: EpisodeItemRole | None, rule: str) -> NoReturn:
    raise DataError(f"{name}, item {position}, role `{role.value if role else None}`: {rule}")
