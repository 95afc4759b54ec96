"""The replies of an epoch in readable form, and the numbers that sum them up.

A *reply* is the result of one attempt at a dataset row: the workflow's output, or the policy's last words if the
workflow returned none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev
from typing import Any

KEY = "replies"
"""Where an epoch's row of metrics.jsonl keeps its ``ReplyNumbers``."""

EQUAL_WITHIN = 1e-12
"""Rewards that differ by no more than this are equal, as they are where advantages are computed."""

EXAMPLES = 3
"""Replies that a finding shows."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One attempt.

    Attributes:
        row: id of the dataset row.
        question: what was asked.
        expected: the answer that the row wants, or None.
        text: what was answered.
        reward: the evaluator's score, or None.
        verdict: what the evaluator said about it, or why there is no reward.
        tokens: tokens that the policy sampled, over all calls of the attempt.
        calls: calls that the attempt made.
        cut: those of them that ended at the token limit.
    """

    row: str
    question: str
    expected: str | None
    text: str
    reward: float | None
    verdict: str
    tokens: int
    calls: int
    cut: int

    @property
    def is_empty(self) -> bool:
        """Whether the reply is empty."""
        return not self.text.strip()


@dataclass(frozen=True, slots=True)
class ReplyNumbers:
    """The replies of one epoch in numbers. Means and the standard deviation are over the replies that have a reward.

    Attributes:
        rows: dataset rows with a reward.
        rows_with_signal: those whose attempts got different rewards.
        tokens_mean: sampled tokens of a reply.
        calls, cut: LLM calls, and those of them that ended at the token limit.
        empty: replies without a word.
    """

    replies: int
    rows: int
    rows_with_signal: int
    reward_mean: float | None
    reward_min: float | None
    reward_max: float | None
    tokens_mean: float
    calls: int
    cut: int
    empty: int
    reward_std: float = 0.0

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> ReplyNumbers:
        """Count ``replies``; of those without a reward, only the calls count."""
        scored = [reply for reply in replies if reply.reward is not None]
        rewards = [reply.reward for reply in scored if reply.reward is not None]
        by_row: dict[str, list[float]] = defaultdict(list)
        for reply in scored:
            by_row[reply.row].append(float(reply.reward or 0.0))
        return cls(
            replies=len(scored),
            rows=len(by_row),
            rows_with_signal=sum(max(rewards_G) - min(rewards_G) > EQUAL_WITHIN for rewards_G in by_row.values()),
            reward_mean=fmean(rewards) if rewards else None,
            reward_min=min(rewards, default=None),
            reward_max=max(rewards, default=None),
            tokens_mean=fmean(reply.tokens for reply in scored) if scored else 0.0,
            calls=sum(reply.calls for reply in replies),
            cut=sum(reply.cut for reply in replies),
            empty=sum(reply.is_empty for reply in scored),
            reward_std=pstdev(rewards) if rewards else 0.0,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ReplyNumbers | None:
        """The numbers that an epoch's row of metrics.jsonl keeps, or None for a row without them."""
        kept = row.get(KEY)
        return None if kept is None else cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``of_row`` reads it back."""
        return asdict(self)


def examples(replies: Sequence[Reply]) -> list[Reply]:
    """The first replies, as different as possible: other texts first, then other rows."""
    by_text: dict[str, Reply] = {}
    by_row: dict[str, Reply] = {}
    for reply in replies:
        by_text.setdefault(reply.text, reply)
        by_row.setdefault(reply.row, reply)
    chosen: list[Reply] = []
    for reply in (*by_text.values(), *by_row.values(), *replies):
        if reply not in chosen:
            chosen.append(reply)
        if len(chosen) == EXAMPLES:
            break
    return chosen
