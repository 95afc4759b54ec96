"""GPT-OSS: a reply is a series of messages in channels (https://github.com/openai/harmony, docs/format.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from nat_plugin_evsys.policy.tool_calls import (
    Piece,
    ReplyParser,
    Thought,
    ToolCall,
    ToolCallFormat,
    held_back,
    tool_call_id,
)
from nat_plugin_evsys.policy.tool_forms.blocks import Thoughts
from nat_plugin_evsys.policy.tool_forms.form import Asked, Tool, ToolForm, inexpressible, parameters_of
from nat_plugin_evsys.policy.tool_forms.functions import ends_in_string, function_of, json_value
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal
from nat_plugin_evsys.policy.tool_forms.stepping import SteppingParser

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _CALL, _RETURN = "<|end|>", "<|call|>", "<|return|>"
_ENDS = (_END, _CALL, _RETURN, _START)
_NAME = r"[\w.-]+"
_IN_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(rf"\bto=functions\.({_NAME})")


class HarmonyForm(ToolForm):
    """A call ends the turn, so there is one at most. Text before it is a preamble in the channel ``commentary``."""

    name: ClassVar[ToolCallFormat] = "harmony"
    ends = (_CALL, _RETURN)
    call_end = _CALL
    is_marked = True

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return _CHANNEL in template and "functions." in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``. Thoughts have a channel of their own."""
        return _Parser(tools=True, reply_id=reply_id)

    def plain_parser(self, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``. Messages to functions are text."""
        return _Parser(tools=False)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``."""
        return lark.any_of(*(lark.rule("call", _call(lark, tool)) for tool in tools))

    def reply(self, lark: Lark, asked: Asked) -> str:
        """See ``ToolForm``. The prompt ends with ``<|start|>assistant``."""
        text = lark.text(without=_ENDS)
        calls = [self.calls(lark, asked.tools, several=False)] if asked.tools else []
        again = f'{lark.marker(_END)} {lark.marker(_START)} "assistant"'
        thoughts = f"({_header(lark, 'analysis')} {text} {again})*" if asked.thinks else ""
        if asked.must_call:
            return f"{thoughts} {calls[0]}"
        if asked.schema is not None:
            answer = f"{_header(lark, 'final')} {lark.json(asked.schema)}"
            return f"{thoughts} {lark.any_of(answer, *calls)}"
        preamble = f"({_header(lark, 'commentary')} {text} {again})?"
        return f"{thoughts} ({_header(lark, 'final')} {text} | {preamble} {calls[0]})"


def _call(lark: Lark, tool: Tool) -> str:
    name = tool["name"]
    if not re.fullmatch(_NAME, name):
        raise inexpressible(f"the tool's name {name!r} has other characters than letters, digits, `_-.`")
    recipient = f"{lark.marker(_CHANNEL)} {literal(f'commentary to=functions.{name} ')}"
    return f'{recipient} {lark.marker(_CONSTRAIN)} "json" {lark.marker(_MESSAGE)} {lark.json(parameters_of(tool))}'


def _header(lark: Lark, channel: str) -> str:
    return f"{lark.marker(_CHANNEL)} {literal(channel)} {lark.marker(_MESSAGE)}"


class _Parser(SteppingParser):
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
        recipient = _RECIPIENT.search(header) if self._tools else None
        found = self._end(in_json=recipient is not None, final=final)
        if found is None:
            if recipient is not None and not final:
                return False
            keep = 0 if final else held_back(self._text, _ENDS)
            body, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
            self._emit(header, recipient, body, pieces)
            return False
        at, end = found
        self._emit(header, recipient, self._text[:at], pieces)
        self._text = self._text[at + len(end) :]
        self._header = None
        return True

    def _end(self, *, in_json: bool, final: bool) -> tuple[int, str] | None:
        """Where the message ends, and the marker there. One within a string of JSON belongs to that."""
        found = sorted((match.start(), end) for end in _ENDS for match in re.finditer(re.escape(end), self._text))
        first = found[0] if found else None
        if not in_json:
            return first
        beyond = (each for each in found if not ends_in_string(self._text[: each[0]]))
        return next(beyond, first if final else None)

    def _emit(self, header: str, recipient: re.Match[str] | None, body: str, pieces: list[Piece]) -> None:
        if recipient is not None:
            function = function_of(recipient[1], json_value(body) if body.strip() else {})
            if function is not None:
                pieces.append(ToolCall(tool_call_id(self._reply_id, self._calls), *function))
                self._calls += 1
                return
            self.malformed += 1
        channel = _IN_CHANNEL.search(header)
        if body:
            pieces.append(Thought(body) if channel is not None and channel[1] == "analysis" else body)
