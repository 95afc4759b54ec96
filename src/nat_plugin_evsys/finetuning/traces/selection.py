"""Which recorded trajectories are trained on, and in which form."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nat.data_models.finetuning import DPOItem, OpenAIMessage, Trajectory

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.finetuning.curriculum import ROLLOUT_ID_KEY
from nat_plugin_evsys.rollouts.advantages import ZERO_SPREAD
from nat_plugin_evsys.rollouts.episodes import text_of
from nat_plugin_evsys.rollouts.preferences import PAIRED_ATTEMPTS_KEY, PAIRED_CALLS_KEY
from nat_plugin_evsys.rollouts.trajectories import calls_of

Groups = list[list[Trajectory]]
"""The trajectories of each question."""


def best(groups: Groups, min_reward: float | None, top_share: float | None) -> Groups:
    """The trajectories of at least ``min_reward``, among the ``top_share`` of the highest rewards (one at least)."""
    ranked = sorted((each for group in groups for each in group), key=lambda each: -each.reward)
    if top_share is not None:
        ranked = ranked[: max(1, math.floor(top_share * len(ranked) + 0.5))]
    taken = {id(each) for each in ranked if min_reward is None or each.reward >= min_reward}
    return [[each for each in group if id(each) in taken] for group in groups]


def pairs(groups: Groups) -> Groups:
    """At most one trajectory of preference pairs for each question: the best record with the worst, and so on inwards.

    A pair is the first prompt at which its two records part, with their replies. Pairs of NAT are text: replies with
    tool calls, and calls that were offered tools, are in none.
    """
    return [[made] if (made := _paired(group)) is not None else [] for group in groups]


def _paired(group: Sequence[Trajectory]) -> Trajectory | None:
    ranked = sorted(group, key=lambda each: -each.reward)
    items: list[DPOItem] = []
    calls: list[Call] = []
    for better, worse in zip(ranked, reversed(ranked), strict=True):
        if better.reward - worse.reward <= ZERO_SPREAD:
            break
        if (two := _parting(calls_of(better), calls_of(worse))) is not None:
            items.append(_item(*two))
            calls += two
    if not items:
        return None
    metadata = {
        ROLLOUT_ID_KEY: (ranked[0].metadata or {}).get(ROLLOUT_ID_KEY),
        PAIRED_CALLS_KEY: [list(call.key) for call in calls],
        PAIRED_ATTEMPTS_KEY: len(calls),
    }
    return Trajectory(episode=items, reward=ranked[0].reward, metadata=metadata)


def _parting(first: Sequence[Call], second: Sequence[Call]) -> tuple[Call, Call] | None:
    """The first two calls that answer one prompt in different words."""
    for one, other in zip(first, second, strict=False):
        if one.prompt_ids != other.prompt_ids:
            return None
        if one.output_ids != other.output_ids:
            return (one, other) if _is_text(one) and _is_text(other) else None
    return None


def _is_text(call: Call) -> bool:
    return not call.tools and not any(message.get("tool_calls") for message in (*call.messages, call.reply))


def _item(chosen: Call, rejected: Call) -> DPOItem:
    return DPOItem(
        prompt=[OpenAIMessage(role=each["role"], content=text_of(each.get("content"))) for each in chosen.messages],
        chosen_response=text_of(chosen.reply.get("content")),
        rejected_response=text_of(rejected.reply.get("content")),
    )
