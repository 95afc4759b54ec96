"""``[TOOL_CALLS]`` before a list of calls as JSON, or (since tokenizer v11) before each ``name[ARGS]{…}``: Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar, Literal

from nat_plugin_evsys.policy.tool_calls import ReplyParser, ToolCallFormat, tool_call_id
from nat_plugin_evsys.policy.tool_forms.blocks import MORE, Block, BlockParser, Thoughts
from nat_plugin_evsys.policy.tool_forms.form import (
    Tool,
    ToolForm,
    inexpressible,
    json_call,
    parameters_of,
)
from nat_plugin_evsys.policy.tool_forms.functions import function_of, json_function, json_prefix
from nat_plugin_evsys.policy.tool_forms.lark import Lark, literal

_OPEN, _CALL_ID, _ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME = r"[\w.-]+"
_ID_LENGTH = 9


class MistralForm(ToolForm):
    """Which of the two it is, and whether calls have ids, is read from the template."""

    name: ClassVar[ToolCallFormat] = "mistral"
    opening = _OPEN

    @staticmethod
    def is_shown_by(template: str) -> bool:
        """See ``ToolForm``."""
        return _OPEN in template

    def parser(self, tools: Sequence[Tool], reply_id: str, thoughts: Thoughts) -> ReplyParser:
        """See ``ToolForm``."""
        return BlockParser(_Reader(), thoughts, reply_id=reply_id, call_id=_short_id)

    def calls(self, lark: Lark, tools: Sequence[Tool], *, several: bool) -> str:
        """See ``ToolForm``."""
        if _ARGS not in self._template:
            return f'" "? "[" {lark.series(json_call(lark, tools, "arguments"), literal(", "), several)} "]"'
        call = lark.any_of(*(lark.rule("call", self._named_call(lark, tool)) for tool in tools))
        return lark.series(call, lark.marker(_OPEN), several)

    def _named_call(self, lark: Lark, tool: Tool) -> str:
        if not re.fullmatch(_NAME, tool["name"]):
            raise inexpressible(f"the tool's name {tool['name']!r} has other characters than letters, digits, `_-.`")
        has_id = _CALL_ID in self._template
        call_id = f"{lark.marker(_CALL_ID)} /[a-zA-Z0-9]{{{_ID_LENGTH}}}/" if has_id else ""
        return f"{literal(tool['name'])} {call_id} {lark.marker(_ARGS)} {lark.json(parameters_of(tool))}"


class _Reader:
    opens: Sequence[str] = (_OPEN,)
    _HEAD = re.compile(rf"\s*({_NAME})(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\s*\{{)")

    def read(self, opening: str, text: str, final: bool) -> Block | Literal["more"] | None:
        """See ``BlockReader``."""
        if not final and not text.strip():
            return MORE
        if text.lstrip().startswith(("[", "{")):
            value, end = json_prefix(text)
            functions = [json_function(item) for item in (value if isinstance(value, list) else [value])]
        else:
            match = self._HEAD.match(text)
            value, end = json_prefix(text[match.end() :]) if match else (None, 0)
            end += match.end() if match and end else 0
            functions = [function_of(match[1], value) if match else None]
        if not end and not final:
            return MORE  # the marker is a token of its own, so what follows is a call if it ever ends
        calls = [function for function in functions if function is not None]
        return (calls, end) if end and calls and len(calls) == len(functions) else None


def _short_id(reply_id: str, number: int) -> str:
    """Mistral's templates take ids of nine letters and digits only."""
    return tool_call_id(reply_id, number)[-_ID_LENGTH:]
