"""Tool calls in a model's text: found while it streams, never lost when malformed.

Each parser takes text in pieces of any size and gives the same result whatever the sizes: a stream and a plain reply
are parsed by the same code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol

ToolCallFormat = Literal["hermes", "llama3_json"]
"""``hermes``: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` blocks (Hermes, Qwen 2.5, Qwen 3).
``llama3_json``: the whole reply is ``{"name": …, "parameters": {…}}``, several separated by ``;`` (Llama 3.1+)."""

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
class AssistantReply:
    """A parsed reply. ``content`` is None only where there are tool calls and no text."""

    content: str | None
    tool_calls: list[ToolCall]

    def to_message(self) -> dict[str, Any]:
        """The assistant message in OpenAI form."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        return message


Piece = str | ToolCall
"""What a parser gives out: text of the content, or one complete tool call."""


class ReplyParser(Protocol):
    """Takes a reply's text piece by piece."""

    def feed(self, text: str) -> list[Piece]:
        """What is certain after ``text``."""
        ...

    def finish(self) -> list[Piece]:
        """What is left at the end of the reply."""
        ...


def create_parser(tool_format: ToolCallFormat | None, *, reply_id: str = "", thinking: bool = False) -> ReplyParser:
    """A parser for one reply.

    Args:
        tool_format: None leaves all text in the content.
        reply_id: tool call ids are derived from it, so that parsing twice gives the same ids.
        thinking: the prompt ended inside a ``<think>`` block.
    """
    if tool_format == "hermes":
        return HermesParser(reply_id=reply_id, thinking=thinking)
    if tool_format == "llama3_json":
        return Llama3JsonParser(reply_id=reply_id)
    return TextParser()


def assemble(pieces: list[Piece]) -> AssistantReply:
    """The reply that the pieces of a parser make."""
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    content = "".join(piece for piece in pieces if isinstance(piece, str))
    return AssistantReply(content if content or not calls else None, calls)


class TextParser:
    """All text is content."""

    def feed(self, text: str) -> list[Piece]:
        """The text as it is."""
        return [text] if text else []

    def finish(self) -> list[Piece]:
        """Nothing is ever held back."""
        return []


class HermesParser:
    """Finds ``<tool_call>`` blocks outside ``<think>`` blocks.

    A block that is not closed, is not JSON, or is not exactly ``{"name": str, "arguments": object}`` stays in the
    content as it was written. One line end before a well-formed block belongs to the block (the templates write it
    there), and so does the white space between blocks and after the last one.
    """

    _OPEN, _CLOSE = "<tool_call>", "</tool_call>"
    _THINK, _END_THINK = "<think>", "</think>"

    def __init__(self, *, reply_id: str = "", thinking: bool = False) -> None:
        self._reply_id = reply_id
        self._state: Literal["content", "think", "call"] = "think" if thinking else "content"
        self._text = ""  # not decided yet
        self._space = ""  # white space that a tool call may follow
        self._calls = 0
        self._content_since_call = False

    def feed(self, text: str) -> list[Piece]:
        """What is certain after ``text``."""
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        """What is left at the end of the reply; an unclosed block is content."""
        pieces: list[Piece] = []
        while self._state == "call":
            self._state = "content"
            self._emit(self._OPEN, pieces)
            while self._step(pieces):
                pass
        self._emit(self._text, pieces)
        self._text = ""
        if self._space and (self._content_since_call or not self._calls):
            pieces.append(self._space)
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Decide on one more marker; False when more text is needed."""
        if self._state == "call":
            return self._step_call(pieces)
        markers = [self._END_THINK] if self._state == "think" else [self._OPEN, self._THINK]
        found = [(at, marker) for marker in markers if (at := self._text.find(marker)) >= 0]
        if not found:
            keep = held_back(self._text, markers)
            self._emit(self._text[: len(self._text) - keep], pieces)
            self._text = self._text[len(self._text) - keep :]
            return False
        at, marker = min(found)
        self._emit(self._text[:at] + ("" if marker == self._OPEN else marker), pieces)
        self._text = self._text[at + len(marker) :]
        self._state = {self._OPEN: "call", self._THINK: "think", self._END_THINK: "content"}[marker]  # type: ignore[assignment]
        return True

    def _step_call(self, pieces: list[Piece]) -> bool:
        block, closed, rest = self._text.partition(self._CLOSE)
        if not closed:
            return False
        self._state = "content"
        function = parse_function(block, "arguments")
        if function is None:  # the marker becomes text, and what follows it is read again
            self._emit(self._OPEN, pieces)
            return True
        self._text = rest
        if self._content_since_call and (space := self._space.removesuffix("\n")):
            pieces.append(space)
        self._space, self._content_since_call = "", False
        pieces.append(ToolCall(tool_call_id(self._reply_id, self._calls), *function))
        self._calls += 1
        return True

    def _emit(self, text: str, pieces: list[Piece]) -> None:
        text = self._space + text
        body = text.rstrip(SPACE)
        self._space = text[len(body) :]
        if body:
            pieces.append(body)
            self._content_since_call = True


class Llama3JsonParser:
    """A reply that opens with ``{`` (or ``<|python_tag|>``) may be tool calls, which only its end decides."""

    _TAG = "<|python_tag|>"

    def __init__(self, *, reply_id: str = "") -> None:
        self._reply_id = reply_id
        self._text = ""
        self._plain = False

    def feed(self, text: str) -> list[Piece]:
        """The text as soon as it cannot be tool calls."""
        if self._plain:
            return [text] if text else []
        self._text += text
        start = self._text.lstrip(SPACE)
        if not start or start.startswith(("{", self._TAG)) or self._TAG.startswith(start):
            return []
        self._plain = True
        return [self._text]

    def finish(self) -> list[Piece]:
        """The tool calls, or the text when it was none."""
        if self._plain:
            return []
        functions = self._functions(self._text.strip(SPACE).removeprefix(self._TAG))
        if functions:
            return [ToolCall(tool_call_id(self._reply_id, n), *function) for n, function in enumerate(functions)]
        return [self._text] if self._text else []

    def _functions(self, text: str) -> list[tuple[str, str]]:
        decoder, functions = json.JSONDecoder(), []
        while True:
            text = text.lstrip(SPACE)
            try:
                _, end = decoder.raw_decode(text)
            except (ValueError, RecursionError):
                return []
            function = parse_function(text[:end], "parameters")
            if function is None:
                return []
            functions.append(function)
            text = text[end:].lstrip(SPACE)
            if not text:
                return functions
            if not text.startswith(";"):
                return []
            text = text[1:]


def parse_function(text: str, arguments_key: str) -> tuple[str, str] | None:
    """``(name, arguments as JSON text)`` of ``{"name": …, <arguments_key>: {…}}``; None when it is not exactly that."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"name", arguments_key}:
        return None
    name, arguments = value["name"], value[arguments_key]
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")  # json.loads would take NaN and Infinity


def held_back(text: str, markers: list[str]) -> int:
    """Length of the longest end of ``text`` that may be the beginning of a marker."""
    for length in range(min(len(text), max(map(len, markers), default=1) - 1), 0, -1):
        if any(len(marker) > length and marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def tool_call_id(reply_id: str, number: int) -> str:
    """The id of a reply's tool call number ``number``."""
    return "call_" + hashlib.blake2b(f"{reply_id}/{number}".encode(), digest_size=12).hexdigest()
