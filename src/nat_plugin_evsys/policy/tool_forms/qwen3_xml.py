"""``<tool_call><function=NAME><parameter=KEY>…</parameter></function></tool_call>``: Qwen3-Coder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from nat_plugin_evsys.policy.tool_calls import Function, ReplyParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import MORE, Block, BlockParser, Thoughts
from nat_plugin_evsys.policy.tool_forms.form import Tool, ToolForm, inexpressible, parameters_of
from nat_plugin_evsys.policy.tool_forms.functions import ends_in_string, function_of, json_value
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal
from nat_plugin_evsys.policy.tool_forms.schemas import Parameter, Text, parameters

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_NAME = r"[^>\s]+"


class Qwen3XmlForm(ToolForm):
    """Strings stand as they are, everything else as JSON. The ``<tool_call>`` around a call may be missing."""

    name: ClassVar[ToolCallFormat] = "qwen3_xml"
    opening = _OPEN
    no_text = (_FUNCTION,)

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return _FUNCTION in template and _PARAMETER in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``."""
        return BlockParser(_Reader(tools), thoughts, reply_id=reply_id)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``. Only declared parameters can be written."""
        function = lark.any_of(*(lark.rule("function", _function(lark, tool)) for tool in tools))
        block = rf'"\n" {function} "\n" {lark.marker(_CLOSE)}'
        return lark.series(block, rf'"\n" {lark.marker(_OPEN)}', several)


def _function(lark: Lark, tool: Tool) -> str:
    known = parameters(parameters_of(tool))
    for name in (tool["name"], *(each.name for each in known)):
        if not re.fullmatch(_NAME, name):
            raise inexpressible(f"the name {name!r} has white space or `>`")
    written = " ".join(
        f"{lark.rule('parameter', _parameter(lark, tool, each))}{'' if each.required else '?'}" for each in known
    )
    head = literal(f"{_FUNCTION}{tool['name']}>\n")
    return f"{head} {written} {literal(_END_FUNCTION)}"


def _parameter(lark: Lark, tool: Tool, parameter: Parameter) -> str:
    head, end = literal(f"{_PARAMETER}{parameter.name}>\n"), f"\n{_END_PARAMETER}"
    text = parameter.text
    if text is None:
        return rf'{head} {lark.json(parameter.schema)} {literal(end)} "\n"'
    lark.unheld += [
        f"`{word}` of `{parameter.name}` of `{tool['name']}`: this model writes strings bare" for word in text.unheld
    ]
    values = [literal(value + end) for value in text.choices or ()]
    if any(_END_PARAMETER in value for value in text.choices or ()):
        raise inexpressible(f"a value of `{parameter.name}` contains `{_END_PARAMETER}`")
    if text.nullable:
        values.append(literal("null" + end))
    if text.choices is None:
        values = [lark.text_of_length(text.shortest, text.longest, end), *values]
    return rf'{head} {lark.any_of(*values)} "\n"'


class _Reader:
    """Reads a parameter that its schema calls a string as it is, others as JSON if they are that."""

    opens: Sequence[str] = (_OPEN, _FUNCTION)
    _HEAD = re.compile(rf"({_NAME})>")
    _KEY = re.compile(rf"\s*{_PARAMETER}({_NAME})>")

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._texts: dict[str, dict[str, Text | None]] = {
            tool["name"]: {each.name: each.text for each in parameters(parameters_of(tool))} for tool in tools
        }

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockReader``."""
        start = 0
        if opening == _OPEN:
            start = len(text) - len(text.lstrip())
            if not text.startswith(_FUNCTION, start):
                return MORE if not final and _FUNCTION.startswith(text[start:]) else None
            start += len(_FUNCTION)
        if _END_FUNCTION not in text[start:]:
            return None if final else MORE
        head = self._HEAD.match(text, start)
        if head is None:
            return None
        found = self._arguments(head[1], text, head.end(), final)
        if found is None or found == MORE:
            return found
        arguments, at = found
        function = function_of(head[1], arguments)
        return None if function is None else _closed(function, text, at, final)

    def _arguments(
        self, name: str, text: str, at: int, final: bool
    ) -> tuple[dict[str, Any], int] | Literal["more"] | None:
        """The arguments from ``at`` on, and where their function ends."""
        arguments: dict[str, Any] = {}
        texts = self._texts.get(name, {})
        while key := self._KEY.match(text, at):
            spec = texts.get(key[1])
            end = _end_of_value(text, key.end(), is_text=spec is not None, final=final)
            if end < 0:
                return None if final else MORE
            arguments[key[1]] = _value(text[key.end() : end], spec)
            at = end + len(_END_PARAMETER)
        rest = text[at:].lstrip()
        if rest.startswith(_END_FUNCTION):
            return arguments, len(text) - len(rest) + len(_END_FUNCTION)
        may_go_on = any(marker.startswith(rest) for marker in (_END_FUNCTION, _PARAMETER)) or (
            rest.startswith(_PARAMETER) and re.fullmatch(r"[^>\s]*", rest[len(_PARAMETER) :]) is not None
        )
        return MORE if may_go_on and not final else None


def _closed(function: Function, text: str, at: int, final: bool) -> Block | Literal["more"]:
    """The call that ends at ``at``, with the closing marker behind it if there is one."""
    rest = text[at:].lstrip()
    if not final and len(rest) < len(_CLOSE) and _CLOSE.startswith(rest):
        return MORE
    return [function], len(text) - len(rest) + len(_CLOSE) if rest.startswith(_CLOSE) else at


def _end_of_value(text: str, start: int, *, is_text: bool, final: bool) -> int:
    """Where a value ends, or -1. JSON may have the closing tag within a string."""
    first = end = text.find(_END_PARAMETER, start)
    if is_text or not text[start:].lstrip().startswith(("{", "[", '"')):
        return end
    while end >= 0 and json_value(text[start:end]) is None and ends_in_string(text[start:end]):
        end = text.find(_END_PARAMETER, end + 1)
    return first if end < 0 and final else end


def _value(text: str, spec: Text | None) -> Any:
    text = text.removeprefix("\n").removesuffix("\n")
    if spec is not None:
        return None if spec.nullable and text == "null" else text
    value = json_value(text)
    return text if value is None and text.strip() != "null" else value
