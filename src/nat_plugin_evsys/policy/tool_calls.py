"""What a model's reply is made of: text, thoughts and tool calls, found while it streams, never lost when malformed.

Each parser takes text in pieces of any size and gives the same result whatever the sizes: a stream and a plain reply
are parsed by the same code. ``tool_forms`` has the parsers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

ToolCallFormat = Literal["hermes", "qwen3_xml", "llama3_json", "pythonic", "mistral", "deepseek", "harmony"]
"""How a model writes tool calls.

``hermes``: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` blocks (Hermes, Qwen 2.5, Qwen 3).
``qwen3_xml``: ``<tool_call><function=NAME><parameter=KEY>…</parameter></function></tool_call>`` (Qwen3-Coder).
``llama3_json``: the whole reply is ``{"name": …, "parameters": {…}}``, several separated by ``;`` (Llama 3.1+).
``pythonic``: the whole reply is ``[name(key=value), …]`` (Llama 3.2 and 4 with a pythonic template).
``mistral``: ``[TOOL_CALLS][{"name": …, "arguments": {…}}]`` or, since v11, ``[TOOL_CALLS]name{…}``.
``deepseek``: ``<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`` within one block (V3, R1, V3.1).
``harmony``: messages in channels; a call is one to ``functions.NAME`` (GPT-OSS)."""

SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a function. ``arguments`` is a JSON object as text, as OpenAI has it."""

    id: str
    name: str
    arguments: str

    def to_openai(self) -> dict[str, Any]:
        """The entry of an assistant message's ``tool_calls``."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of the reasoning, which is not part of the content."""

    text: str


@dataclass(frozen=True, slots=True)
class AssistantReply:
    """A parsed reply. ``content`` is None only where there are tool calls and no text."""

    content: str | None
    tool_calls: list[ToolCall]
    reasoning: str | None = None

    def to_message(self) -> dict[str, Any]:
        """The assistant message in OpenAI form, with vLLM's ``reasoning_content`` where there is any."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        return message


Piece = str | Thought | ToolCall
"""What a parser gives out: text of the content or of the reasoning, or one complete tool call."""

Function = tuple[str, str]
"""A call's name and its arguments, a JSON object as text."""


class ReplyParser(Protocol):
    """Takes a reply's text piece by piece.

    Attributes:
        malformed: what looked like the beginning of a tool call, was none, and is content.
    """

    malformed: int

    def feed(self, text: str) -> list[Piece]:
        """What is certain after ``text``."""
        ...

    def finish(self) -> list[Piece]:
        """What is left at the end of the reply."""
        ...


class TextParser:
    """All text is content."""

    malformed = 0

    def feed(self, text: str) -> list[Piece]:
        """The text as it is."""
        return [text] if text else []

    def finish(self) -> list[Piece]:
        """Nothing is ever held back."""
        return []


def assemble(pieces: Sequence[Piece]) -> AssistantReply:
    """The reply that the pieces of a parser make."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    thoughts = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    return AssistantReply(content if content or not calls else None, calls, thoughts or None)


def held_back(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of a marker."""
    for length in range(min(len(text), max(map(len, markers), default=1) - 1), 0, -1):
        if any(len(marker) > length and marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def tool_call_id(reply_id: str, number: int) -> str:
    """The id of a reply's tool call number ``number``."""
    return "call_" + hashlib.blake2b(f"{reply_id}/{number}".encode(), digest_size=12).hexdigest()
