"""``{"name": …, "parameters": {…}}``, several separated by ``;``, is the whole reply: Llama 3.1 and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from nat_plugin_evsys.policy.tool_calls import SPACE, Function, ReplyParser, ToolCallFormat
from nat_plugin_evsys.policy.tool_forms.blocks import Thoughts
from nat_plugin_evsys.policy.tool_forms.form import Tool, ToolForm, json_call
from nat_plugin_evsys.policy.tool_forms.functions import json_function, json_prefix
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal
from nat_plugin_evsys.policy.tool_forms.whole_reply import WholeReply

_TAG = "<|python_tag|>"


class Llama3JsonForm(ToolForm):
    """Perhaps behind ``<|python_tag|>``."""

    name: ClassVar[ToolCallFormat] = "llama3_json"
    no_beginning = ("{", _TAG)
    ends = ("<|eom_id|>",)  # of a turn that calls a built-in tool

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return _TAG in template or '{"name": function name, "parameters"' in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``."""
        return _Parser(reply_id=reply_id)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``."""
        return lark.series(json_call(lark, tools, "parameters"), literal("; "), several)


class _Parser(WholeReply):
    _TAGS = (_TAG,)
    _OPENS = "{"

    def _functions(self, text: str) -> list[Function]:
        functions = []
        while True:
            value, end = json_prefix(text)
            function = json_function(value, bare=False)  # an answer in JSON may have a name too
            if function is None:
                return []
            functions.append(function)
            text = text[end:].lstrip(SPACE)
            if not text:
                return functions
            if not text.startswith(";"):
                return []
            text = text[1:]

    def _looks_like_calls(self, text: str) -> bool:
        return _TAG in text or ('"name"' in text and ('"parameters"' in text or '"arguments"' in text))
