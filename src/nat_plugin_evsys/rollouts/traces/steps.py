"""NAT's intermediate steps as JSON -> the LLM calls among them.

What a model read stands in LLM_START, what it said in LLM_END. NAT leaves the tool calls out of LLM_END; they are taken
from the messages of the next call, which repeats the reply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.rollouts.episodes import Message, text_of
from nat_plugin_evsys.rollouts.traces.record import Record, TracedCall, content_of

Step = Mapping[str, Any]

_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool", "function": "tool"}


def is_step(entry: Any) -> bool:
    """Whether this is an intermediate step, which tells the run that it is of."""
    if not isinstance(entry, Mapping) or "function_ancestry" not in entry:
        return False
    payload = entry.get("payload")
    return isinstance(payload, Mapping) and all(
        _is_name(each) for each in (payload.get("UUID"), entry.get("parent_id"))
    )


def runs_of(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps of each workflow run, told apart by their parents: exporters mix runs that went on at once."""
    parents = {_payload(step).get("UUID"): step.get("parent_id") for step in steps}
    runs: dict[Any, list[Step]] = {}
    for step in steps:
        root, seen = _payload(step).get("UUID"), set()
        while (parent := parents.get(root)) in parents and root not in seen:
            seen.add(root)
            root = parent
        runs.setdefault(root, []).append(step)
    return list(runs.values())


def ids_of(steps: Sequence[Step]) -> set[Any]:
    """What a step that is lost from the run may name as its parent."""
    return {_payload(step).get("UUID") for step in steps}


def record_of_run(steps: Sequence[Step], name: str) -> Record:
    """One run of a telemetry file; without its end it is ``unfinished_trace``."""
    record = Record(name, steps=[dict(step) for step in steps])
    ended = False
    for step in steps:
        payload = _payload(step)
        data = payload.get("data") or {}
        if payload.get("event_type") == "WORKFLOW_START":
            record.question = data.get("input")
            record.entry |= ((payload.get("metadata") or {}).get("provided_metadata")) or {}
        elif payload.get("event_type") == "WORKFLOW_END":
            record.output, ended = data.get("output"), True
    read_calls(record, steps)
    if not ended:
        record.problem = DropReason.UNFINISHED_TRACE
    return record


def read_calls(record: Record, steps: Sequence[Step]) -> None:
    """Add the LLM calls of ``steps`` to the record, or say what is missing."""
    starts = {_payload(step).get("UUID"): step for step in steps if _payload(step).get("event_type") == "LLM_START"}
    ends = [step for step in steps if _payload(step).get("event_type") == "LLM_END"]
    prompts = [_prompt(starts.get(_payload(end).get("UUID"))) for end in ends]
    if not all(prompts):
        record.problem = DropReason.PROMPT_UNKNOWN
        return
    for end, prompt in zip(ends, prompts, strict=True):
        call = _call(starts[_payload(end)["UUID"]], end, prompt or [], [later for later in prompts if later])
        if call is None:
            record.problem = DropReason.REPLY_UNKNOWN
            return
        record.calls.append(call)


def _call(start: Step, end: Step, prompt: list[Message], later: list[list[Message]]) -> TracedCall | None:
    payload = _payload(end)
    generation = (((payload.get("metadata") or {}).get("chat_responses")) or [{}])[0]
    message = generation.get("message") or {}
    text = text_of(message.get("content", (payload.get("data") or {}).get("output")))
    reply = _repeated(prompt, text, later) or _message({**message, "type": "ai", "content": text})
    if not reply["content"] and not reply.get("tool_calls"):
        return None
    facts = message.get("response_metadata") or {}
    usage = ((payload.get("usage_info") or {}).get("token_usage")) or {}
    return TracedCall(
        messages=prompt,
        reply=reply,
        tools=[_tool(tool) for tool in ((_payload(start).get("metadata") or {}).get("tools_schema")) or []],
        logprobs=list((facts.get("logprobs") or {}).get("content") or ()),
        model=str(payload.get("name") or ""),
        prompt_tokens=usage.get("prompt_tokens") or None,
        reply_tokens=usage.get("completion_tokens") or None,
        functions=tuple(filter(None, [str((end.get("function_ancestry") or {}).get("function_name") or "")])),
    )


def _repeated(prompt: list[Message], text: str, later: list[list[Message]]) -> Message | None:
    """The reply with its tool calls, as a later call repeats it after the same messages."""
    at = len(prompt)
    for messages in later:
        if len(messages) <= at or messages[:at] != prompt or messages[at]["role"] != "assistant":
            continue
        if messages[at]["content"] == text and messages[at].get("tool_calls"):
            return messages[at]
    return None


def _prompt(start: Step | None) -> list[Message] | None:
    """The messages of LLM_START; None where there is no such step, or it has them as one text."""
    data = {} if start is None else _payload(start).get("data") or {}
    inputs = data.get("input")
    if isinstance(inputs, list) and inputs and all(isinstance(each, Mapping) and "content" in each for each in inputs):
        return [_message(each) for each in inputs]
    return None


def _message(entry: Mapping[str, Any]) -> Message:
    role = str(entry.get("role") or _ROLES.get(str(entry.get("type")), "user"))
    message: Message = {"role": role, "content": content_of(entry.get("content"))}
    given = entry.get("tool_calls") or (entry.get("additional_kwargs") or {}).get("tool_calls")
    if role == "assistant" and given:
        message["tool_calls"] = [_tool_call(call) for call in given]
    if entry.get("tool_call_id"):
        message["tool_call_id"] = entry["tool_call_id"]
    return message


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """LangChain's ``{name, args, id}``, or OpenAI's, in OpenAI's form."""
    if "function" in call:
        return dict(call)
    arguments = json.dumps(call.get("args") or {})
    return {"id": call.get("id"), "type": "function", "function": {"name": call.get("name"), "arguments": arguments}}


def _tool(schema: Mapping[str, Any]) -> dict[str, Any]:
    """NAT's copy of a tool's schema as it was sent: without what NAT adds to it."""
    return {"type": "function", "function": _plain(schema.get("function") or {})}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        added = ("strict", "additionalProperties")
        named = {"type" if key == "type_" else key: _plain(each) for key, each in value.items() if key not in added}
        return {key: each for key, each in named.items() if each is not None}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _is_name(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _payload(step: Step) -> Mapping[str, Any]:
    payload: Mapping[str, Any] = step["payload"]
    return payload
