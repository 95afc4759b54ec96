"""The APIs that one reply can be written in: each turns chat completions, whole or streamed, into its own form."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.protocol import ChatCompletion, dumps, to_json

_OF_CHATS = ("messages", "tools", "chat_template_kwargs", "continue_final_message")


def refuse_chat_fields(body: Mapping[str, Any], prompt: str) -> None:
    """Refuse what the chat template would show, where ``prompt`` is all that the policy reads.

    Raises:
        ApiError: 400 that names the field.
    """
    for name in _OF_CHATS:
        if body.get(name):
            message = f"`{name}`: the policy reads `{prompt}` alone here; send a chat to /v1/chat/completions"
            raise bad_request(message, param=name, code="unsupported_parameter")


class Dialect(Protocol):
    """One API, for one request."""

    def answer(self, completion: ChatCompletion) -> bytes:
        """The body of a plain answer."""
        ...

    def events(self, chat: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The events of a streamed answer, from those of ``completion_events``."""
        ...


class ChatDialect:
    """Chat completions as they are."""

    def answer(self, completion: ChatCompletion) -> bytes:
        """See ``Dialect``."""
        return to_json(completion)

    def events(self, chat: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """See ``Dialect``."""
        return chat


async def chunks_of(chat: AsyncGenerator[bytes, None]) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a chat stream, and what it sends instead after an error (``{"error": …}``)."""
    async with aclosing(chat):
        async for event in chat:
            data = event.removeprefix(b"data: ").strip()
            if data != b"[DONE]":
                yield json.loads(data)


def event_of(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + dumps(value) + b"\n\n"
