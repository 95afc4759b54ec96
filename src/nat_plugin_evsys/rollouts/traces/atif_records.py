"""Trajectories in ATIF -> the LLM calls in them: NAT's own, and those of this package's ``rollouts/``.

NAT's converter leaves system prompts out; ``prompt_tokens`` shows it where the model is the same (see ``to_calls``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nat_plugin_evsys.rollouts.episodes import Message, text_of
from nat_plugin_evsys.rollouts.traces.record import Record, TracedCall, content_of


def record_of_atif(trajectory: Mapping[str, Any], name: str) -> Record:
    """The record of one trajectory.

    A step of the agent is a call if it has metrics or names its model; where no step does, each is one. Copied context
    is none.
    """
    steps = trajectory.get("steps") or []
    extra = trajectory.get("extra") or {}
    said = [step for step in steps if step.get("source") == "agent"]
    marked = [step for step in said if step.get("metrics") or step.get("model_name")]
    model = str((trajectory.get("agent") or {}).get("model_name") or "")
    tools = list((trajectory.get("agent") or {}).get("tool_definitions") or [])
    record = Record(name, entry=dict(trajectory))
    record.question = extra.get("question", next((_text(each) for each in steps if each.get("source") == "user"), None))
    record.expected = extra.get("expected")
    record.output = extra.get("output", _text(said[-1]) if said else None)
    messages: list[Message] = []
    new: list[Message] = []
    conversation: Any = None
    for step in steps:
        message = _message(step)
        if step.get("source") != "agent" or step.get("is_copied_context"):
            new.append(message)
        elif not marked or step in marked:
            own = (step.get("extra") or {}).get("conversation")
            messages, conversation = (messages + new if own == conversation else new), own
            record.calls.append(_call(step, messages, message, tools, model))
            messages, new = [*messages, message], []
        new += _observations(step)
    return record


def _call(step: Mapping[str, Any], messages: list[Message], reply: Message, tools: list[Any], model: str) -> TracedCall:
    metrics = step.get("metrics") or {}
    return TracedCall(
        messages=list(messages),
        reply=reply,
        tools=tools,
        logprobs=list(metrics.get("logprobs") or ()),
        token_ids=_token_ids(metrics.get("completion_token_ids")),
        model=str(step.get("model_name") or model),
        prompt_tokens=metrics.get("prompt_tokens"),
        reply_tokens=metrics.get("completion_tokens"),
        functions=tuple((step.get("extra") or {}).get("functions") or ()),
        without_system=messages[:1] == [] or messages[0]["role"] != "system",
    )


def _token_ids(given: Any) -> list[int] | None:
    ids = None if given is None else list(given)
    if ids and not all(type(each) is int for each in ids):
        raise TypeError("completion_token_ids are not integers")
    return ids


def _message(step: Mapping[str, Any]) -> Message:
    role = {"agent": "assistant"}.get(str(step.get("source")), str(step.get("source")))
    message: Message = {"role": role, "content": content_of(step.get("message"))}
    if calls := step.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call.get("tool_call_id"),
                "type": "function",
                "function": {"name": call.get("function_name"), "arguments": _arguments(call)},
            }
            for call in calls
        ]
    return message


def _arguments(call: Mapping[str, Any]) -> str:
    raw = (call.get("extra") or {}).get("raw_arguments")
    return str(raw) if raw is not None else json.dumps(call.get("arguments") or {})


def _observations(step: Mapping[str, Any]) -> list[Message]:
    results = (step.get("observation") or {}).get("results") or []
    return [
        {"role": "tool", "content": content_of(each.get("content")), "tool_call_id": each.get("source_call_id")}
        for each in results
    ]


def _text(step: Mapping[str, Any]) -> str:
    return text_of(step.get("message"))
