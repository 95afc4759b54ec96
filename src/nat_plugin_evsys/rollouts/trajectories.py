"""Recorded calls <-> NAT trajectories, and the group of one dataset row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nat.data_models.finetuning import Trajectory

from nat_plugin_evsys.call_images import check_images
from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.errors import DataError, ShapedDistributionError
from nat_plugin_evsys.rollouts.advantages import call_returns
from nat_plugin_evsys.rollouts.episodes import episode_of
from nat_plugin_evsys.rollouts.roles import validate_episode_order

CALLS_KEY = "calls"
"""Key of ``Trajectory.metadata`` under which the exact tokens travel through NAT."""


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """All attempts at one dataset row.

    Attributes:
        name: the group's name in messages.
        rewards_G: reward of each trajectory.
        calls_G: recorded calls of each trajectory.
        step_rewards_G: one reward per call besides the trajectory's own; None for a trajectory (or all) without.
    """

    name: str
    rewards_G: list[float]
    calls_G: list[list[Call]]
    step_rewards_G: list[list[float] | None] | None = None

    @property
    def num_calls(self) -> int:
        """Calls of all trajectories together."""
        return sum(len(calls) for calls in self.calls_G)

    def first_returns(self, discount: float) -> list[float]:
        """``R_0`` of each trajectory, length G: its reward, if there are no step rewards and ``discount`` is 1."""
        steps_G = self.step_rewards_G or [None] * len(self.rewards_G)
        return [
            call_returns(reward, len(calls), steps, discount)[0] if calls else reward
            for reward, calls, steps in zip(self.rewards_G, self.calls_G, steps_G, strict=True)
        ]


def build_trajectory(
    calls: list[Call], reward: float, metadata: dict[str, Any], step_rewards: list[float] | None = None
) -> Trajectory:
    """The trajectory of one attempt: its episode view, and in ``metadata["calls"]`` every call with its exact tokens.

    Args:
        step_rewards: one for each call in the order in which they were made; NAT's ``shaped_rewards``.

    Raises:
        DataError: no calls, or ``metadata`` already has the key ``calls``.
    """
    if not calls:
        raise DataError(f"a trajectory needs at least one recorded call; count this attempt as {DropReason.NO_CALLS}")
    if CALLS_KEY in metadata:
        raise DataError(f"metadata key `{CALLS_KEY}` is reserved for the recorded calls; name it differently")
    ordered = sorted(calls, key=lambda call: (call.sequence, call.index))
    return Trajectory(
        episode=episode_of(ordered),
        reward=reward,
        shaped_rewards=step_rewards,
        metadata={**metadata, CALLS_KEY: [call.to_dict() for call in ordered]},
    )


def num_calls(trajectory: Trajectory) -> int:
    """Recorded calls of a trajectory, unchecked; 0 of one without."""
    return len((trajectory.metadata or {}).get(CALLS_KEY, ()))


def calls_of(trajectory: Trajectory, name: str = "trajectory") -> list[Call]:
    """The recorded calls that ``build_trajectory`` put in; checked for shape.

    Raises:
        DataError: there are none recorded, or one is malformed.
    """
    recorded = (trajectory.metadata or {}).get(CALLS_KEY)
    if not isinstance(recorded, list):
        raise DataError(
            f"{name}: no recorded calls in metadata['{CALLS_KEY}'], and no assistant item with logprobs; text alone "
            "cannot be trained on. Use evsys_trajectory_builder, give each reply its logprobs, or set the adapter's "
            "retokenize: true to train on the tokens of the text"
        )
    return [checked_call(entry, f"{name}, call {position}") for position, entry in enumerate(recorded)]


def group_of(trajectories: list[Trajectory], index: int) -> TrajectoryGroup:
    """Validate the trajectories of one dataset row and read their rewards and calls.

    Args:
        index: position of the group in its collection.

    Raises:
        DataError: role order, reward or recorded calls are wrong; names the trajectory.
    """
    steps_G: list[list[float] | None] = []
    group = TrajectoryGroup(_group_name(trajectories, index), [], [], steps_G)
    for position, trajectory in enumerate(trajectories):
        name = f"trajectory {position} of {group.name}"
        validate_episode_order(trajectory, name)
        if not math.isfinite(trajectory.reward):
            raise DataError(f"{name}: reward {trajectory.reward} is not finite; a failed evaluation is not a reward")
        group.rewards_G.append(trajectory.reward)
        calls, steps = calls_of(trajectory, name), trajectory.shaped_rewards
        if steps is not None and (len(steps) != len(calls) or not all(math.isfinite(step) for step in steps)):
            raise DataError(f"{name}: shaped_rewards {steps} for {len(calls)} calls; give one finite number a call")
        group.calls_G.append(calls)
        steps_G.append(None if steps is None else list(steps))
    return group


def _group_name(trajectories: list[Trajectory], index: int) -> str:
    row = (trajectories[0].metadata or {}).get("row_id") if trajectories else None
    return f"group {index}" if row is None else f"group {index} (row {row})"


def checked_call(entry: Any, name: str) -> Call:
    try:
        call = entry if isinstance(entry, Call) else Call(**entry)
    except TypeError as error:
        raise DataError(f"{name}: not a recorded call: {error}") from error
    if len(call.output_ids) != len(call.logprobs):
        raise DataError(f"{name} ({call.call_id}): {len(call.output_ids)} output_ids, {len(call.logprobs)} logprobs")
    cut = {"top_p": call.top_p} if call.top_p < 1 else {}
    cut |= {"top_k": call.top_k} if call.top_k > 0 else {}
    if cut or call.shaped:
        raise ShapedDistributionError(f"{name} ({call.call_id})", {**cut, **call.shaped})
    for what, ids in (("prompt_ids", call.prompt_ids), ("output_ids", call.output_ids)):
        wrong = next((token for token in ids if type(token) is not int or token < 0), None)
        if wrong is not None:
            raise DataError(f"{name} ({call.call_id}): {what} holds {wrong!r}, which is not a token id")
    check_images(call.images, call.prompt_ids, f"{name} ({call.call_id})")
    return call
