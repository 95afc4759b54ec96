"""Replies that are either text or calls, which only their end decides."""

from __future__ import annotations

from abc import ABC, abstractmethod

from nat_plugin_evsys.policy.tool_calls import SPACE, Function, Piece, ToolCall, tool_call_id


class WholeReply(ABC):
    """Holds back a reply that opens like calls."""

    _TAGS: tuple[str, ...] = ()
    _OPENS = ""

    def __init__(self, *, reply_id: str = "") -> None:
        self.malformed = 0
        self._reply_id = reply_id
        self._text = ""
        self._plain = False

    def feed(self, text: str) -> list[Piece]:
        """The text as soon as it cannot be tool calls."""
        if self._plain:
            return [text] if text else []
        self._text += text
        start = self._text.lstrip(SPACE)
        if (
            not start
            or start.startswith((self._OPENS, *self._TAGS))
            or any(tag.startswith(start) for tag in self._TAGS)
        ):
            return []
        self._plain = True
        return [self._text]

    def finish(self) -> list[Piece]:
        """The tool calls, or the text when it was none."""
        if self._plain:
            return []
        text = self._text.strip(SPACE)
        for tag in self._TAGS:
            text = text.removeprefix(tag).removesuffix(tag)
        functions = self._functions(text.strip(SPACE))
        if functions:
            return [ToolCall(tool_call_id(self._reply_id, n), *function) for n, function in enumerate(functions)]
        self.malformed += self._looks_like_calls(self._text)
        return [self._text] if self._text else []

    @abstractmethod
    def _functions(self, text: str) -> list[Function]:
        """The calls that a text consists of; none if it has anything else."""

    @abstractmethod
    def _looks_like_calls(self, text: str) -> bool:
        """Whether a reply without calls was meant to have some."""
