"""Attempts in ATIF: nothing that was said or sampled is lost, and NAT's own model reads it back."""

from __future__ import annotations

from typing import Any

import pytest
from nat.atif import Trajectory

from nat_plugin_evsys.calls import Call, CallFate
from nat_plugin_evsys.rollouts.atif import atif_trajectory
from nat_plugin_evsys.rollouts.attempts import Attempt

TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who owns the wifi?"}


def tool_call(arguments: str, call_id: str = "id-1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "lookup", "arguments": arguments}}


def two_turns(call: Any, arguments: str = '{"word": "wifi"}') -> list[Call]:
    asking = {"role": "assistant", "content": "", "tool_calls": [tool_call(arguments)]}
    result = {"role": "tool", "tool_call_id": "id-1", "content": "network"}
    first = call([1, 2], [3, 4, 5], messages=[SYSTEM, USER], tools=TOOLS, reply=asking, policy_version=2)
    reply = {"role": "assistant", "content": "The network team."}
    second = call([1, 2, 3, 4, 5, 6], [7], messages=[SYSTEM, USER, asking, result], tools=TOOLS, reply=reply)
    return [first, second]


def convert(calls: list[Call], fates: dict[Any, CallFate] | None = None, **extra: Any) -> Trajectory:
    attempt = Attempt("r1", "run", calls, 1.0, None, None)
    made = atif_trajectory(
        attempt,
        fates or {},
        lambda ids: [f"<{token}>" for token in ids],
        session="run-1",
        name="epoch-0001/r1/0",
        agent="tool_calling_agent",
        model="builtin/tiny",
        extra=extra,
    )
    return Trajectory.model_validate_json(made.model_dump_json(exclude_none=True))


def test_messages_tool_calls_and_results_stand_in_their_order(call: Any) -> None:
    read = convert(two_turns(call), reward=0.5)
    assert [(step.source, step.message) for step in read.steps] == [
        ("system", "Be brief."),
        ("user", "Who owns the wifi?"),
        ("agent", ""),
        ("agent", "The network team."),
    ]
    asking = read.steps[2]
    assert [(used.function_name, used.arguments) for used in asking.tool_calls or ()] == [("lookup", {"word": "wifi"})]
    assert asking.observation is not None
    assert [(seen.source_call_id, seen.content) for seen in asking.observation.results] == [("id-1", "network")]
    assert read.agent.tool_definitions == TOOLS
    assert read.extra == {"reward": 0.5}


def test_every_sampled_token_has_its_text_its_logprob_and_what_training_made_of_it(call: Any) -> None:
    calls = two_turns(call)
    fates = {
        calls[0].key: CallFate(None, 0.75, [-0.5, None, float("-inf")]),
        calls[1].key: CallFate("zero_variance_group"),
    }
    read = convert(calls, fates)
    first, second = (step for step in read.steps if step.metrics is not None)
    assert first.metrics is not None
    assert second.metrics is not None
    assert first.metrics.completion_token_ids == [3, 4, 5]
    assert first.metrics.logprobs == calls[0].logprobs
    assert first.metrics.extra == {
        "token_texts": ["<3>", "<4>", "<5>"],
        "advantage": 0.75,
        "learner_logprobs": [-0.5, None, -9999.0],
    }
    assert (first.extra or {})["policy_version"] == 2
    assert (second.extra or {})["dropped"] == "zero_variance_group"
    assert (second.metrics.extra or {}).get("advantage") is None
    assert read.final_metrics is not None
    assert (read.final_metrics.total_prompt_tokens, read.final_metrics.total_completion_tokens) == (8, 4)


@pytest.mark.parametrize("written", ["{half", "[1]", '"text"'])
def test_arguments_that_are_no_json_object_are_kept_as_written(call: Any, written: str) -> None:
    used = (convert(two_turns(call, written)).steps[2].tool_calls or [])[0]
    assert used.arguments == {}
    assert used.extra == {"raw_arguments": written}


def test_what_was_not_sampled_here_is_copied_context(call: Any) -> None:
    shots = [USER, {"role": "assistant", "content": "network"}, {"role": "user", "content": "And mail?"}]
    read = convert([call([1], [2], messages=shots)])
    assert [step.is_copied_context for step in read.steps] == [None, True, None, None]
    assert [step.metrics is None for step in read.steps] == [True, True, True, False]


def test_a_tool_result_without_a_caller_is_still_shown(call: Any) -> None:
    orphan = {"role": "tool", "tool_call_id": "gone", "content": "late"}
    read = convert([call([1], [2], messages=[orphan])])
    assert (read.steps[0].message, read.steps[0].extra) == ("late", {"role": "tool"})


def test_two_conversations_follow_one_another(call: Any) -> None:
    read = convert([call([1], [2]), call([1], [3])])
    assert [(step.extra or {}).get("conversation") for step in read.steps] == [None, 0, None, 1]


def test_an_attempt_without_calls_is_empty(call: Any) -> None:
    assert convert([]).steps == []
