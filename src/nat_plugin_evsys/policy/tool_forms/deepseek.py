"""``<｜tool▁calls▁begin｜>`` around calls: DeepSeek. V3 and R1 write a type and a fenced block, V3.1 neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from nat_plugin_evsys.policy.tool_calls import Function, ReplyParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import Block, BlockParser, Thoughts, closed_block
from nat_plugin_evsys.policy.tool_forms.form import Tool, ToolForm, inexpressible, parameters_of
from nat_plugin_evsys.policy.tool_forms.functions import function_of, json_prefix
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal

_OPEN, _CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_LINE = "\n"
_NAME = r"[^\s<｜]+"


class DeepSeekForm(ToolForm):
    """Which of the two it is, is read from the template."""

    name: ClassVar[ToolCallFormat] = "deepseek"
    opening = _OPEN

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return _OPEN in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``."""
        return BlockParser(_Reader(), thoughts, reply_id=reply_id)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``."""
        fenced = "```json" in self._template
        call = lark.any_of(*(lark.rule("call", self._call(lark, tool, fenced)) for tool in tools))
        return f"{lark.series(call, literal(_LINE if fenced else ''), several)} {lark.marker(_CLOSE)}"

    def _call(self, lark: Lark, tool: Tool, fenced: bool) -> str:
        name, arguments = tool["name"], lark.json(parameters_of(tool))
        if not re.fullmatch(_NAME, name):
            raise inexpressible(f"the tool's name {name!r} has white space or one of `<｜`")
        begin, separator, end = lark.marker(_CALL), lark.marker(_SEPARATOR), lark.marker(_END_CALL)
        if not fenced:
            return f"{begin} {literal(name)} {separator} {arguments} {end}"
        head, tail = literal(f"{name}\n```json\n"), literal("\n```")
        return f'{begin} "function" {separator} {head} {arguments} {tail} {end}'


class _Reader:
    opens: Sequence[str] = (_OPEN,)
    _HEAD = re.compile(
        rf"\s*{_CALL}(?:function{_SEPARATOR})?\s*({_NAME})\s*(?:{_SEPARATOR}|\n)\s*(?:```json\s*)?", re.DOTALL
    )
    _TAIL = re.compile(rf"(?:\s*```)?\s*{_END_CALL}\s*")

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockReader``."""
        return closed_block(text, _CLOSE, self._functions, final)

    def _functions(self, block: str) -> list[Function]:
        """The calls that a block consists of; none if it has anything else."""
        functions: list[Function] = []
        at = 0
        while head := self._HEAD.match(block, at):
            value, length = json_prefix(block[head.end() :])
            tail = self._TAIL.match(block, head.end() + length)
            function = function_of(head[1], value) if tail else None
            if function is None or tail is None:
                return []
            functions.append(function)
            at = tail.end()
        return [] if block[at:].strip() else functions
