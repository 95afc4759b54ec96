"""One rollout: scored, trained on and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.calls import Call, DropReason


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

    @property
    def untrainable(self) -> DropReason | None:
        """Why the rollout gives no trajectory; None where it gives one."""
        if self.lost is not None:
            return self.lost
        return None if self.calls else self.cause or DropReason.NO_CALLS
