"""What NAT's evaluator said of a rollout becomes its attempt: the reward, and the rewards of its single calls."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from nat.data_models.evaluator import EvalInputItem
from nat.data_models.intermediate_step import (
    IntermediateStep,
    IntermediateStepPayload,
    IntermediateStepType,
    TraceMetadata,
)
from nat.data_models.invocation_node import InvocationNode
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.finetuning.workflow.evaluation import attempts_of
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.policy.recorder import Recorder


def attempt(reasoning: Any, calls: int = 2, score: Any = 1.0) -> Any:
    """The attempt of a rollout with that many calls, of which an evaluator says this."""
    recorder = Recorder()
    recorder.open_run("run", "rollout", None)
    for number in range(calls):
        recorder.record(
            Call(
                call_id=f"c{number}",
                index=0,
                run_id="run",
                step_id=None,
                policy_version=0,
                prompt_ids=[1],
                output_ids=[2],
                logprobs=[-1.0],
                stop_reason="stop",
                temperature=1.0,
                top_p=1.0,
                messages=[],
                tools=[],
                reply={},
                sequence=-1,
            )
        )
    payload = IntermediateStepPayload(
        event_type=IntermediateStepType.WORKFLOW_START,
        metadata=TraceMetadata(provided_metadata={"workflow_run_id": "run"}),
    )
    step = IntermediateStep(
        parent_id="root", function_ancestry=InvocationNode(function_id="f", function_name="f"), payload=payload
    )
    item = EvalInputItem(
        id="row_rep1", input_obj="q", expected_output_obj="a", full_dataset_entry={"id": "row"}, trajectory=[step]
    )
    scored = EvalOutputItem(id=item.id, score=score, reasoning=reasoning)
    return attempts_of(item, [scored], Rollouts("run", "rollout", 0, recorder, exporters=None))[0]  # type: ignore[arg-type]


def test_an_evaluator_may_reward_each_call() -> None:
    found = attempt({"step_rewards": [0.25, 1]})
    assert (found.row_id, found.number, found.reward, found.lost) == ("row", 1, 1.0, None)
    assert found.step_rewards == [0.25, 1]
    assert [call.call_id for call in found.calls] == ["c0", "c1"]


@pytest.mark.parametrize("reasoning", ["right", {"mode": "exact"}, None])
def test_most_do_not(reasoning: Any) -> None:
    found = attempt(reasoning)
    assert (found.reward, found.step_rewards) == (1.0, None)


@pytest.mark.parametrize("steps", [[1.0], [1.0, float("nan")], [True, 1.0], "high", [1.0, 2.0, 3.0]])
def test_what_is_not_a_number_for_each_call_is_no_reward(steps: Any) -> None:
    found = attempt({"step_rewards": steps})
    assert (found.reward, found.step_rewards, found.lost) == (None, None, DropReason.EVALUATOR_ERROR)
    assert "2 calls; give one number for each" in found.error


@pytest.mark.parametrize(
    ("score", "reward"),
    [
        (True, 1.0),
        (False, 0.0),
        (2, 2.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (Decimal("0.25"), 0.25),
    ],
)
def test_every_kind_of_number_is_a_reward(score: Any, reward: float) -> None:
    made = attempt(None, score=score)
    assert made.lost is None
    assert made.reward == reward
    assert type(made.reward) is float


@pytest.mark.parametrize("score", [None, "1.0", float("nan"), Decimal("Infinity"), [1.0], np.array([1.0, 2.0])])
def test_what_is_no_finite_number_is_no_reward(score: Any) -> None:
    made = attempt(None, score=score)
    assert made.lost is DropReason.EVALUATOR_ERROR
    assert made.reward is None
    assert "not a finite number" in made.error
