"""GPT-OSS: a reply is a series of messages in channels (https://github.com/openai/harmony, docs/format.md)."""

from __future__ import annotations

import re

from nat_plugin_evsys.policy.tool_calls import Piece, Thought, ToolCall, held_back, tool_call_id
from nat_plugin_evsys.policy.tool_forms.functions import function_of, json_value
from nat_plugin_evsys.policy.tool_forms.stepping import SteppingParser

_START, _MESSAGE = "<|start|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([\w.-]+)")


class HarmonyParser(SteppingParser):
    """``final`` (and ``commentary`` to nobody) is content, ``analysis`` reasoning, a message to a function a call.

    The prompt ends with ``<|start|>assistant``, so a reply begins within a header. One that begins as no header does is
    content.

    Args:
        tools: read calls; otherwise a message to a function is content as it was written.
    """

    def __init__(self, *, tools: bool, reply_id: str = "") -> None:
        super().__init__()
        self._tools = tools
        self._reply_id = reply_id
        self._header: str | None = None  # of the message that is being read
        self._first = True
        self._calls = 0

    def finish(self) -> list[Piece]:
        """What is left at the end of the reply."""
        pieces = self._advance("", final=True)
        if self._header is None and self._text:  # a header that never became a message
            pieces.append(self._text)
        self._text = ""
        return pieces

    def _step(self, pieces: list[Piece], final: bool) -> bool:
        return self._read_header() if self._header is None else self._read_body(pieces, final)

    def _read_header(self) -> bool:
        begins = self._text.lstrip()
        opens = ("<|channel|>", "to=", _START, _MESSAGE)
        if self._first and begins and not any(begins.startswith(o) or o.startswith(begins) for o in opens):
            self._first, self._header = False, ""
            return True
        header, found, rest = self._text.partition(_MESSAGE)
        if not found:
            return False
        self._first, self._header, self._text = False, header, rest
        return True

    def _read_body(self, pieces: list[Piece], final: bool) -> bool:
        header = self._header or ""
        found = [(at, end) for end in _ENDS if (at := self._text.find(end)) >= 0]
        recipient = _RECIPIENT.search(header) if self._tools else None
        if not found:
            if recipient is not None and not final:
                return False
            keep = 0 if final else held_back(self._text, _ENDS)
            body, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
            self._emit(header, recipient, body, pieces)
            return False
        at, end = min(found)
        self._emit(header, recipient, self._text[:at], pieces)
        self._text = self._text[at + len(end) :]
        self._header = None
        return True

    def _emit(self, header: str, recipient: re.Match[str] | None, body: str, pieces: list[Piece]) -> None:
        if recipient is not None:
            function = function_of(recipient[1], json_value(body) if body.strip() else {})
            if function is not None:
                pieces.append(ToolCall(tool_call_id(self._reply_id, self._calls), *function))
                self._calls += 1
                return
            self.malformed += 1
        channel = _CHANNEL.search(header)
        if body:
            pieces.append(Thought(body) if channel is not None and channel[1] == "analysis" else body)
