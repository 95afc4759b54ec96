"""``<tool_call>{"name": …, "arguments": {…}}</tool_call>``: Hermes, Qwen 2.5, Qwen 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from nat_plugin_evsys.policy.tool_calls import ReplyParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import Block, BlockParser, Thoughts, closed_block
from nat_plugin_evsys.policy.tool_forms.form import Tool, ToolForm, json_call
from nat_plugin_evsys.policy.tool_forms.functions import json_functions
from nat_plugin_evsys.policy.tool_forms.lark import Lark

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class HermesForm(ToolForm):
    """At the end of the reply the closing marker may be missing."""

    name: ClassVar[ToolCallFormat] = "hermes"
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
        block = rf'"\n" {json_call(lark, tools, "arguments")} "\n" {lark.marker(_CLOSE)}'
        return lark.series(block, rf'"\n" {lark.marker(_OPEN)}', several)


class _Reader:
    opens: Sequence[str] = (_OPEN,)

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockReader``."""
        return closed_block(text, _CLOSE, json_functions, final)
