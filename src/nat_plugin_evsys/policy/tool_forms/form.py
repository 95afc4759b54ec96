"""A model family's form of tool calls: how it is recognised, read and constrained. ``families`` lists them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.tool_calls import ReplyParser, TextParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import BlockParser, Thoughts
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal

Tool = Mapping[str, Any]
"""A tool's ``name`` and ``parameters``: the ``function`` of its OpenAI form."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The reply that a request asks for.

    Attributes:
        tools: those that may be called.
        must_call: the reply is a call, or several.
        several: there may be more than one.
        thinks: it may think first.
        schema: of the answer, where that is JSON.
    """

    tools: Sequence[Tool]
    must_call: bool
    several: bool
    thinks: bool
    schema: dict[str, Any] | None = None


class ToolForm(ABC):
    """How the models of a family write calls.

    A new family is a subclass, which ``families.FORMS`` lists.

    Args:
        template: the chat template, which may show one of several ways of writing.

    Attributes:
        opening: the marker before the first call; empty where a whole reply is either text or calls.
        no_text: what text beside calls may not contain, as it would be read as a call.
        no_beginning: what a text that is no call may not begin with.
        ends: control tokens that end a turn, beside the one that the template writes after text.
        call_end: the one that ends a turn with a call, if there is one.
        is_marked: replies are written with control tokens, so they are always shown.
    """

    name: ClassVar[ToolCallFormat]
    opening: ClassVar[str] = ""
    no_text: ClassVar[tuple[str, ...]] = ()
    no_beginning: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ()
    call_end: ClassVar[str | None] = None
    is_marked: ClassVar[bool] = False

    def __init__(self, template: str = "") -> None:
        self._template = template

    @staticmethod
    @abstractmethod
    def is_shown_by(template: str) -> bool:
        """Whether a chat template shows this form."""

    @abstractmethod
    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """A parser of one reply.

        Args:
            tools: for forms whose arguments have no types of their own.
            reply_id: tool call ids are derived from it.
        """

    def plain_parser(self, thoughts: Thoughts) -> ReplyParser:
        """A parser of one reply to a request without tools: what looks like a call is text."""
        return plain_parser(thoughts)

    @abstractmethod
    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """What the grammar allows behind ``opening``: a call of one of the tools, or several.

        Raises:
            DataError: the form cannot write such a call.
        """

    def reply(self, lark: Lark, asked: Asked) -> str:
        """What the grammar allows of a whole reply, up to its thoughts between ``<think>`` tags.

        Raises:
            DataError: see ``calls``.
        """
        calls = self.calls(lark, asked.tools, several=asked.several)
        if asked.must_call or asked.schema is not None:
            whole = f"{lark.marker(self.opening)} {calls}"
            return whole if asked.schema is None or asked.must_call else f"{lark.json(asked.schema)} | {whole}"
        if not self.opening:
            return f"{lark.text(not_first=self.no_beginning)} | {calls}"
        text = lark.text(without=(self.opening, *self.no_text))
        return f"{text} | {lark.text_until(self.opening, without=self.no_text)} {calls}"


def plain_parser(thoughts: Thoughts) -> ReplyParser:
    """A parser that finds thoughts, where they are wanted, and no calls."""
    return BlockParser(None, thoughts) if thoughts.split else TextParser()


def json_call(lark: Lark, tools: Sequence[Tool], key: str) -> str:
    """A JSON object with the name of a tool and, under ``key``, its arguments."""
    calls = []
    for tool in tools:
        # The brace on its own, as in a JSON schema's grammar: of two literals the lexer takes the longer one.
        name = literal(tool["name"])
        head = literal(f'"name": {name}, "{key}": ')
        calls.append(lark.rule("call", f'"{{" {head} {lark.json(parameters_of(tool))} "}}"'))
    return lark.any_of(*calls)


def parameters_of(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments; a tool without any takes none."""
    return tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def inexpressible(what: str) -> DataError:
    """An error for a call that the form has no way to write."""
    return DataError(
        f"{what}, so calls in this model's form cannot be constrained; rename it, leave the field out, or set "
        "`hints: ignore` of the policy"
    )
