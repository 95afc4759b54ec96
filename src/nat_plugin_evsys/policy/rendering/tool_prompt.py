"""Tools for models whose chat template has no place for them: a prompt in Hermes' form, and turns that all templates
take.

The words are those of Hermes' and Qwen 2.5's templates.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]


def without_tools(messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, has_system: bool) -> list[Message]:
    """Messages of system, user and assistant alone that show the tools, calls and results as text.

    Args:
        messages: normalized.
        tools: in OpenAI form; may be empty, as when a conversation with calls goes on without tools.
        has_system: the template takes a system turn; otherwise the tools stand in the first user turn.
    """
    shown = _results_as_users([_call_as_text(message) for message in messages])
    return _with_prompt(shown, tools_prompt(tools), has_system=has_system) if tools else shown


def tools_prompt(tools: Sequence[dict[str, Any]]) -> str:
    """What a model reads of its tools."""
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        f"function signatures within <tools></tools> XML tags:\n<tools>\n{signatures}\n</tools>\n\nFor each function "
        "call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _call_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    for call in calls:
        arguments = call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(call["function"]["name"], ensure_ascii=False)
        texts.append(f'<tool_call>\n{{"name": {name}, "arguments": {written}}}\n</tool_call>')
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(texts)}


def _results_as_users(messages: Sequence[Message]) -> list[Message]:
    """Results that follow one another become one turn of the user, which templates with alternating roles take."""
    shown: list[Message] = []
    joins = False
    for message in messages:
        if message["role"] != "tool":
            shown.append(message)
            joins = False
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if joins:
            shown[-1] = {"role": "user", "content": f"{shown[-1]['content']}\n{text}"}
        else:
            shown.append({"role": "user", "content": text})
        joins = True
    return shown


def _with_prompt(messages: list[Message], prompt: str, *, has_system: bool) -> list[Message]:
    role = "system" if has_system else "user"
    if not messages:
        return [{"role": role, "content": prompt}]
    first = messages[0]
    if first["role"] == role:
        content = f"{first['content']}\n\n{prompt}" if has_system else f"{prompt}\n\n{first['content']}"
        return [{**first, "content": content}, *messages[1:]]
    if not has_system and first["role"] == "system":
        return [first, *_with_prompt(messages[1:], prompt, has_system=False)]
    return [{"role": role, "content": prompt}, *messages]
