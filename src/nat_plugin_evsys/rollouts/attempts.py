"""One rollout: scored, trained on and kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.rollouts.advantages import call_advantages


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rollout: which row it tried, the calls it made, and its reward or the reason it has none.

    Attributes:
        row_id: id of the dataset row.
        run_id: NAT's workflow_run_id of the rollout; "" where NAT recorded none.
        reward: the evaluator's score; None when ``lost`` is not.
        lost: why there is no reward, or None.
        error: what the workflow raised, or what went wrong, or None.
        cause: why the workflow failed, or could make no call: ``prompt_too_long``, ``request_refused`` or
            ``workflow_error``; None where it ended well.
        question, expected, output: the row's input, the answer it wants, and what the workflow returned ("" where it
            raised).
        reasoning: what the evaluator said about it, or None.
        entry: the whole dataset row.
        number: which of the attempts at its row it is, from 0.
        seconds: how long the workflow ran.
        step_rewards: one reward per call, if the evaluator gives them; see ``advantages``.
        round: 0 for an epoch's own rollouts; k for those that dynamic sampling made in its k-th round.
        replaced: whether a later round has replaced it.
    """

    row_id: str
    run_id: str
    calls: list[Call]
    reward: float | None
    lost: DropReason | None
    error: str | None
    cause: DropReason | None = None
    question: Any = None
    expected: Any = None
    output: Any = None
    reasoning: Any = None
    entry: Any = None
    number: int = 0
    seconds: float | None = None
    step_rewards: list[float] | None = None
    round: int = 0
    replaced: bool = False

    @property
    def untrainable(self) -> DropReason | None:
        """Why the rollout gives no trajectory; None where it gives one."""
        if self.lost is not None:
            return self.lost
        if self.calls and self.replaced:
            return DropReason.REPLACED_GROUP
        return None if self.calls else self.cause or DropReason.NO_CALLS


def rows_without_signal(attempts: Iterable[Attempt], discount: float = 1.0) -> list[str]:
    """Ids of the rows of which no call has an advantage, so that comparing their attempts teaches nothing.

    That is where all have earned the same, by the same number of calls if ``discount`` is below 1.

    Attempts that give no trajectory do not count; a row with fewer than two that do is not among them, since another
    round would not be better.
    """
    rows: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        if attempt.untrainable is None:
            rows.setdefault(attempt.row_id, []).append(attempt)
    return [row_id for row_id, group in rows.items() if len(group) > 1 and not _has_signal(group, discount)]


def with_replacements(attempts: Sequence[Attempt], again: Iterable[Attempt], round: int) -> list[Attempt]:
    """The attempts after another round at some of the rows, whose earlier attempts it replaces.

    Where fewer than two of a row's new attempts give a trajectory, nothing is replaced: they are more of the old group.

    Args:
        again: the new attempts, numbered from 0 in each row.
        round: which round it is, from 1.
    """
    made = list(again)
    trainable = Counter(attempt.row_id for attempt in made if attempt.untrainable is None)
    rows = {row for row, number in trainable.items() if number > 1}
    kept = [replace(attempt, replaced=attempt.row_id in rows or attempt.replaced) for attempt in attempts]
    before = max((attempt.number for attempt in kept), default=-1) + 1
    return [*kept, *(replace(attempt, number=before + attempt.number, round=round) for attempt in made)]


def _has_signal(group: Sequence[Attempt], discount: float) -> bool:
    advantages_G = call_advantages(
        [attempt.reward for attempt in group if attempt.reward is not None],
        [len(attempt.calls) for attempt in group],
        "group_mean",  # all methods that compare have the same zeros
        step_rewards_G=[attempt.step_rewards for attempt in group],
        discount=discount,
    )
    return any(any(values) for values in advantages_G)
