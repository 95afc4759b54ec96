"""Rollouts of other programs become calls with the tokens that were recorded, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.errors import DataError, ShapedDistributionError
from nat_plugin_evsys.rollouts.datums import group_datums
from nat_plugin_evsys.rollouts.token_records import gym_group, recorded_call


def gym_result(reward: float, *, cut: bool = False, **response: Any) -> dict[str, Any]:
    """Two replies, the first of which calls a tool; the conversation's ids go on."""
    call = {"type": "function_call", "name": "add", "arguments": "{}", "call_id": "1"}
    first = {"prompt_token_ids": [1, 2], "generation_token_ids": [3, 4], "generation_log_probs": [-0.5, -0.25]}
    second = {"prompt_token_ids": [1, 2, 3, 4, 5], "generation_token_ids": [6], "generation_log_probs": [-1.0]}
    output = [
        {"type": "message", "role": "assistant", "content": []},
        {**call, **first},
        {"type": "function_call_output", "call_id": "1", "output": "5"},
        {"type": "message", "role": "assistant", "content": [], **second},
    ]
    incomplete = {"reason": "max_output_tokens"} if cut else None
    answer = {"output": output, "temperature": 0.5, "top_p": None, "incomplete_details": incomplete, **response}
    return {"reward": reward, "response": answer}


def test_a_gym_rollout_is_a_call_for_each_reply() -> None:
    group = gym_group([gym_result(1.0), gym_result(0.0, cut=True)], "task 3")
    assert group.rewards_G == [1.0, 0.0]
    for calls, last in zip(group.calls_G, ("stop", "length"), strict=True):
        assert [(call.prompt_ids, call.output_ids, call.logprobs) for call in calls] == [
            ([1, 2], [3, 4], [-0.5, -0.25]),
            ([1, 2, 3, 4, 5], [6], [-1.0]),
        ]
        assert [(call.sequence, call.temperature, call.stop_reason) for call in calls] == [
            (0, 0.5, "stop"),
            (1, 0.5, last),
        ]
    datums = group_datums(group, advantage="group_mean", loss_fn="importance_sampling").datums
    assert [datum.model_input.to_ints() for datum in datums] == [[1, 2, 3, 4, 5]] * 2  # one Datum for both replies
    assert datums[0].loss_fn_inputs["advantages"].tolist() == [0.0, 0.5, 0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("response", "error", "words"),
    [
        ({"output": [{"type": "message"}]}, DataError, "rollout 1 of task 3.*return_token_id_information"),
        ({"temperature": None}, DataError, "responses_create_params"),
        ({"top_p": 0.9}, ShapedDistributionError, "top_p"),
    ],
)
def test_what_cannot_be_trained_on_is_named(response: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gym_group([gym_result(1.0), gym_result(0.0, **response)], "task 3")


def test_ids_and_logprobs_belong_together() -> None:
    with pytest.raises(DataError, match=r"reply 7.*2 output_ids, 1 logprobs"):
        recorded_call([1], [2, 3], [-0.5], name="reply 7")
