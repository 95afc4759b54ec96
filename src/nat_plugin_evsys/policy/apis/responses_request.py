"""A request of OpenAI's Responses API as the chat completion that it asks for."""

from __future__ import annotations

from typing import Any

from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.request import ChatCompletionRequest

_SAME = frozenset(
    {
        *("model", "stream", "parallel_tool_calls", "temperature", "top_p", "user", "metadata", "store"),
        *("service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "seed", "top_k"),
    }
)
_IGNORED = frozenset({"include", "reasoning", "truncation", "background", "stream_options", "top_logprobs"})
"""They change nothing that is sampled here: nothing is stored, and a prompt that is too long is refused."""

_KEPT_ELSEWHERE = {
    "previous_response_id": "send the conversation in `input`",
    "conversation": "send the conversation in `input`",
    "prompt": "send the prompt in `instructions` and `input`",
}
_TEXT_PARTS = frozenset({"input_text", "output_text", "text", "refusal", "reasoning_text"})


def chat_request(body: dict[str, Any]) -> ChatCompletionRequest:
    """The chat completion that a request of ``POST /v1/responses`` asks for.

    Raises:
        ApiError: 400 that names the field.
    """
    chat: dict[str, Any] = {name: value for name, value in body.items() if name in _SAME}
    for name, value in body.items():
        if name in _KEPT_ELSEWHERE and value is not None:
            raise bad_request(
                f"`{name}`: nothing is kept between requests; {_KEPT_ELSEWHERE[name]}",
                param=name,
                code="unsupported_parameter",
            )
        if name not in _SAME | _IGNORED | set(_KEPT_ELSEWHERE) | _READ:
            chat[name] = value  # the table of chat requests says what becomes of it
    if body.get("n") not in (None, 1):
        raise bad_request("`n`: a response is one reply", param="n", code="unsupported_parameter")
    if body.get("background"):
        raise bad_request("`background`: an answer is not kept", param="background", code="unsupported_parameter")
    if chat.get("stream"):
        chat["stream_options"] = {"include_usage": True}  # the last event has the counts
    chat["messages"] = _messages(body.get("input"), body.get("instructions"))
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise bad_request("`tools`: must be a list", param="tools", code="invalid_value")
    if tools:
        chat["tools"] = [_tool(tool) for tool in tools]
    if (choice := body.get("tool_choice")) is not None:
        named = isinstance(choice, dict) and choice.get("type") == "function"
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}} if named else choice
    if not tools and chat.get("tool_choice") == "auto":
        del chat["tool_choice"]
    if (text := body.get("text")) and isinstance(text, dict) and text.get("format"):
        chat["response_format"] = _format(text["format"])
    return ChatCompletionRequest.parse(chat)


_READ = frozenset({"input", "instructions", "max_output_tokens", "max_tool_calls", "tools", "tool_choice", "text"})


def _messages(items: Any, instructions: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list) or not items:
        raise bad_request(
            "`input`: must be text or a list of items, which is not empty", param="input", code="invalid_value"
        )
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
    if kind == "message":
        content = _text(item.get("content"), where)
        if item.get("role") == "assistant" and messages and _is_thought(messages[-1]):
            messages[-1]["content"] = content
        else:
            messages.append({"role": item.get("role"), "content": content})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        # One reply is several items: its reasoning, its text, and each of its calls.
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(call)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
    elif kind == "function_call_output":
        output = _text(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
    elif kind == "reasoning":
        if thoughts := _text(item.get("content"), where):  # another model's has only a summary, and what is encrypted
            messages.append({"role": "assistant", "content": None, "reasoning_content": thoughts})
    else:
        raise bad_request(
            f"`{where}` is of type `{kind}`; this endpoint reads message, reasoning, function_call and "
            "function_call_output",
            param="input",
            code="invalid_value",
        )


def _is_thought(message: dict[str, Any]) -> bool:
    """Whether it is the beginning of a reply, whose text and calls may follow."""
    return "reasoning_content" in message and message["content"] is None and "tool_calls" not in message


def _text(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise bad_request(
                f"`{where}.content` has a part of type `{kind}`; the policy reads text only",
                param="input",
                code="invalid_value",
            )
        text = part.get("text") or part.get("refusal") or ""
        if not isinstance(text, str):
            raise bad_request(
                f"`{where}.content` has a part whose text is of type {type(text).__name__}; send text",
                param="input",
                code="invalid_value",
            )
        texts.append(text)
    return "".join(texts)


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else type(tool).__name__
        raise bad_request(
            f"`tools` has one of type `{kind}`; the policy calls functions only", param="tools", code="invalid_value"
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _format(asked: Any) -> Any:
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {name: value for name, value in asked.items() if name != "type"}}
