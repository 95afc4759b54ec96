"""What is said of the rollouts of a batch that failed."""

from __future__ import annotations

import pytest

from nat_plugin_evsys.finetuning.checks.batch_check import failure_notices


def test_each_reason_is_said_with_its_first_error() -> None:
    errors = {"workflow_error": "ConnectionError: refused", "evaluator_error": "no such choice"}
    assert failure_notices({"workflow_error": 2, "evaluator_error": 1}, errors, rollouts=8, scored=8) == [
        "2 of 8 rollouts failed (workflow_error); the first one: ConnectionError: refused",
        "1 of 8 rollouts failed (evaluator_error); the first one: no such choice",
    ]


@pytest.mark.parametrize(("scored", "said"), [(8, False), (4, True), (0, False)])
def test_a_reward_that_leaves_rollouts_out_says_so(scored: int, said: bool) -> None:
    notices = failure_notices({"evaluator_error": 4}, {"evaluator_error": "no such choice"}, 8, scored)
    wanted = ["the mean reward of these rollouts is that of 4 of 8; the others have none"] if said else []
    assert notices[1:] == wanted
