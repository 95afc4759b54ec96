"""What NAT's evaluator said of a rollout becomes its attempt: the reward, and the rewards of its single calls."""

from __future__ import annotations

from dataclasses import replace
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
from nat_plugin_evsys.finetuning.replies import reply_of
from nat_plugin_evsys.finetuning.rollout_keeper import plain
from nat_plugin_evsys.finetuning.workflow.evaluation import attempts_of
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.policy.recorder import Recorder


def attempt(reasoning: Any, calls: int = 2, score: Any = 1.0, reps: int = 2, **fields: Any) -> Any:
    """The attempt of a rollout with that many calls, of which an evaluator says this.

    Args:
        fields: of NAT's item, in addition to or instead of those that matter to no test.
    """
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
    defaults = {"id": "row_rep1", "expected_output_obj": "a", "full_dataset_entry": {"id": "row_rep1"}}
    item = EvalInputItem(input_obj="q", trajectory=[step], **(defaults | fields))
    scored = EvalOutputItem(id=item.id, score=score, reasoning=reasoning)
    rollouts = Rollouts("run", "rollout", 0, recorder, exporters=None)  # type: ignore[arg-type]
    return attempts_of(item, [scored], rollouts, reps)[0]


def test_an_evaluator_may_reward_each_call() -> None:
    found = attempt({"step_rewards": [0.25, 1]})
    assert (found.row_id, found.number, found.reward, found.lost) == ("row", 1, 1.0, None)
    assert found.step_rewards == [0.25, 1]
    assert [call.call_id for call in found.calls] == ["c0", "c1"]
    assert found.entry == {"id": "row"}


@pytest.mark.parametrize(
    ("item_id", "reps", "row_id", "number"),
    [("case_rep2", 1, "case_rep2", 0), ("case_rep2_rep1", 2, "case_rep2", 1), (7, 1, "7", 0), ("7_rep3", 4, "7", 3)],
)
def test_only_of_several_attempts_the_id_says_which_it_is(item_id: Any, reps: int, row_id: str, number: int) -> None:
    found = attempt(None, id=item_id, reps=reps, full_dataset_entry={"id": item_id})
    assert (found.row_id, found.number, found.entry) == (row_id, number, {"id": row_id})


def test_lists_of_a_parquet_file_are_kept_as_lists() -> None:
    tags = np.array(["x", "y"], dtype=object)
    found = attempt(None, expected_output_obj=tags, full_dataset_entry={"id": "row_rep1", "tags": tags})
    assert found.entry["id"] == "row"
    assert plain(found.entry["tags"]) == ["x", "y"]
    assert reply_of(found).expected == '["x", "y"]'


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


def test_tokens_are_counted_of_every_attempt_like_calls() -> None:
    report = RolloutReport()
    scored = attempt(None, calls=2)
    for each in (scored, attempt(None, calls=3, score=None), replace(scored, round=1)):
        report.account(each)
    assert (len(report.rewards), report.extra_rollouts) == (1, 1)
    assert (report.tally.calls, report.sampled_tokens) == (7, 7)


async def test_rollouts_are_numbered_without_a_look_at_those_before() -> None:
    class Attempts(dict[str, int]):
        def values(self) -> Any:
            raise AssertionError("every question's attempts are read for a rollout of one")

    rollouts = Rollouts("run", "rollout", 0, Recorder(), exporters=None)  # type: ignore[arg-type]
    rollouts._attempts = Attempts()
    assert [await rollouts.open(question) for question in "aba"] == ["run/000000", "run/000001", "run/000002"]
    assert rollouts._attempts == {"a": 2, "b": 1}
