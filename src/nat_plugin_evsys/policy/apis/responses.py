"""OpenAI's Responses API: reasoning, text and function calls, whole or streamed. Nothing is kept between requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from nat_plugin_evsys.policy.apis.dialect import chunks_of, event_of
from nat_plugin_evsys.policy.apis.responses_request import chat_request
from nat_plugin_evsys.policy.protocol import ChatCompletion, dumps

_TextItem = Callable[[str, str], dict[str, Any]]
"""An item, from the response's id and a text."""

_ECHOED = ("instructions", "max_output_tokens", "temperature", "top_p", "metadata", "user", "reasoning")


class ResponsesDialect:
    """One request of ``POST /v1/responses``.

    Raises:
        ApiError: 400 that names the field.

    Attributes:
        request: the chat completion that it asks for.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self.request = chat_request(body)
        self._body = body

    def answer(self, completion: ChatCompletion) -> bytes:
        """See ``Dialect``."""
        (choice,) = completion.choices
        response = self.response(completion.id, completion.created)
        texts = [(made, text) for field, made in _TEXTS.items() if (text := choice.message.get(field))]
        items = [made(response["id"], text) for made, text in texts]
        items += [_call(call) for call in choice.message.get("tool_calls") or []]
        return dumps(self.finished(response, items, choice.finish_reason, completion.usage.model_dump()))

    async def events(self, chat: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """See ``Dialect``."""
        stream, number = _ResponseStream(self), 0
        async for chunk in chunks_of(chat):
            for kind, event in stream.take(chunk):
                yield event_of({"type": kind, **event, "sequence_number": number}, kind)
                number += 1

    def response(self, completion_id: str, created: int) -> dict[str, Any]:
        """The response object as it is before anything was sampled."""
        echoed = {name: self._body.get(name) for name in _ECHOED}
        return {
            "id": "resp_" + completion_id.removeprefix("chatcmpl-"),
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": self.request.model,
            "output": [],
            "parallel_tool_calls": self.request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "text": self._body.get("text") or {"format": {"type": "text"}},
            "tool_choice": self._body.get("tool_choice") or "auto",
            "tools": self._body.get("tools") or [],
            "truncation": "disabled",
            "usage": None,
            **echoed,
        }

    def finished(
        self, response: dict[str, Any], items: list[dict[str, Any]], finish: str | None, usage: dict[str, int] | None
    ) -> dict[str, Any]:
        """The response object at the end."""
        cut = finish == "length"
        counts = None if usage is None else _usage(usage)
        return response | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": counts,
        }


class _ResponseStream:
    """Turns the chunks of a chat stream into the events of a response."""

    def __init__(self, dialect: ResponsesDialect) -> None:
        self._dialect = dialect
        self._response: dict[str, Any] | None = None
        self._items: list[dict[str, Any]] = []
        self._made: _TextItem | None = None  # makes the item that is open
        self._text = ""  # of that item
        self._finish: str | None = None

    def take(self, chunk: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The events that a chunk gives."""
        if "error" in chunk:
            yield "error", {name: chunk["error"].get(name) for name in ("code", "message", "param")}
            return
        if self._response is None:
            self._response = self._dialect.response(chunk["id"], chunk["created"])
            yield "response.created", {"response": self._response}
            yield "response.in_progress", {"response": self._response}
        for choice in chunk["choices"]:
            for field, made in _TEXTS.items():
                if text := choice["delta"].get(field):
                    yield from self._add_text(text, made)
            for call in choice["delta"].get("tool_calls") or []:
                yield from self._add_call(call)
            self._finish = choice["finish_reason"] or self._finish
        if chunk.get("usage") is not None:
            yield from self._close_text()
            response = self._dialect.finished(self._response, self._items, self._finish, chunk["usage"])
            yield f"response.{response['status']}", {"response": response}

    def _add_text(self, text: str, made: _TextItem) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._made is not made:
            yield from self._close_text()
            self._made = made
            item, at = self._open_item(made)
            opened = {**item, "content": [], "status": "in_progress"}
            yield "response.output_item.added", {"output_index": len(self._items), "item": opened}
            yield "response.content_part.added", {**at, "part": item["content"][0]}
        item, at = self._open_item(made)
        self._text += text
        yield f"response.{_kind(item)}.delta", {**at, "delta": text, **_no_logprobs(item)}

    def _close_text(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._made is None:
            return
        item, at = self._open_item(self._made)
        yield f"response.{_kind(item)}.done", {**at, "text": self._text, **_no_logprobs(item)}
        yield "response.content_part.done", {**at, "part": item["content"][0]}
        yield "response.output_item.done", {"output_index": len(self._items), "item": item}
        self._items.append(item)
        self._made, self._text = None, ""

    def _add_call(self, call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._close_text()
        item, index = _call(call), len(self._items)
        at = {"output_index": index, "item_id": item["id"]}
        opened = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": opened}
        yield "response.function_call_arguments.delta", {**at, "delta": item["arguments"]}
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield "response.function_call_arguments.done", {**at, **done}
        yield "response.output_item.done", {"output_index": index, "item": item}
        self._items.append(item)

    def _open_item(self, made: _TextItem) -> tuple[dict[str, Any], dict[str, Any]]:
        """The item as far as its text is known, and where it is."""
        assert self._response is not None
        item = made(f"{self._response['id']}_{len(self._items)}", self._text)
        return item, {"item_id": item["id"], "output_index": len(self._items), "content_index": 0}


def _message(response_id: str, text: str) -> dict[str, Any]:
    item_id = "msg_" + response_id.removeprefix("resp_")
    return {
        "id": item_id,
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [_part(text)],
    }


def _reasoning(response_id: str, text: str) -> dict[str, Any]:
    return {
        "id": "rs_" + response_id.removeprefix("resp_"),
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": text}],
    }


_TEXTS: dict[str, _TextItem] = {"reasoning_content": _reasoning, "content": _message}
"""What makes the item of each text of a message, in the order of the items."""


def _kind(item: dict[str, Any]) -> str:
    kind: str = item["content"][0]["type"]
    return kind


def _no_logprobs(item: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": []} if item["type"] == "message" else {}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "fc_" + call["id"].removeprefix("call_"),
        "type": "function_call",
        "call_id": call["id"],
        "name": call["function"]["name"],
        "arguments": call["function"]["arguments"],
        "status": "completed",
    }


def _usage(usage: dict[str, int]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
