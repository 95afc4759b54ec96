"""The form of a reply that a request asks for, as a grammar in llguidance's Lark dialect.

JSON is written as the chat templates write it in the history: one line, ``", "`` and ``": "`` between its parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.tool_calls import ToolCallFormat

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True}
_ANY_TEXT = "/(.|\\n)*/"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a model family writes a tool call.

    Attributes:
        open, close: text around a call's JSON object; an open marker may be empty.
        arguments: the key of the arguments.
        between: text between two calls.
    """

    open: str
    close: str
    arguments: str
    between: str


_CALL_FORMS: dict[ToolCallFormat, CallForm] = {
    "hermes": CallForm("<tool_call>\n", "\n</tool_call>", "arguments", "\n"),
    "llama3_json": CallForm("", "", "parameters", "; "),
}
"""The forms that can be asked for; a model that writes another samples freely."""


@dataclass(frozen=True, slots=True)
class ReplyForms:
    """Makes the grammars of one chat template's replies.

    Args:
        tool_format: how the model writes calls; None if that is unknown.
        special_id: the id of a marker that is one control token; None for plain text.
        thinks: whether the template knows ``<think>`` blocks, which may come before the form.
        thinking: whether the prompt ends inside one.
    """

    tool_format: ToolCallFormat | None
    special_id: Callable[[str], int | None]
    thinks: bool = False
    thinking: bool = False

    def grammar(self, request: ChatCompletionRequest) -> str | None:
        """The grammar of the form that ``request.hints`` ask for; None if calls in this model's form cannot be asked
        for, or nothing is."""
        if not request.hints:
            return None
        schema = _schema(request)
        tools = [tool["function"] for tool in request.shown_tools]
        named = request.tool_choice["function"]["name"] if isinstance(request.tool_choice, dict) else None
        if named is not None:
            tools = [tool for tool in tools if tool["name"] == named]
        if not tools:
            return None if schema is None else self._whole("json", [f"json: {_json(schema)}"])
        if self.tool_format not in _CALL_FORMS:
            return None
        form = _CALL_FORMS[self.tool_format]
        several = request.parallel_tool_calls is not False and named is None
        rules = self._call_rules(form, tools)
        calls = f"call ({_text(form.between)} call)*" if several else "call"
        if named is not None or request.tool_choice == "required":
            return self._whole(calls, rules, may_think=named is None)
        if schema is not None:
            return self._whole(f"json | {calls}", [*rules, f"json: {_json(schema)}"])
        return self._free(form, calls, rules)

    def _free(self, form: CallForm, calls: str, rules: list[str]) -> str:
        """Text, or text and then calls."""
        if not form.open:
            return self._whole(f"TEXT | {calls}", [*rules, "TEXT: /([^{](.|\\n)*)?/"])
        marker = form.open.rstrip("\n")
        rest = _text(form.open[len(marker) :])
        first = calls.removeprefix("call")
        lead = f"TEXT {self._marker(marker)}" if self._is_special(marker) else "until"
        until = [] if self._is_special(marker) else [f"until[lazy]: TEXT {_text(marker)}"]
        start = f"TEXT | {lead} {rest} object {self._marker(form.close)}{first}"
        return self._whole(start, [*rules, *until, f"TEXT: {_ANY_TEXT}"], may_think=False)

    def _call_rules(self, form: CallForm, tools: Sequence[dict[str, Any]]) -> list[str]:
        rules = [
            f"call: {self._marker(form.open)} object {self._marker(form.close)}",
            f"object: {' | '.join(f'tool_{n}' for n in range(len(tools)))}",
        ]
        for n, tool in enumerate(tools):
            # The brace on its own, as in a JSON schema's grammar: of two literals the lexer takes the longer one.
            head = f'"name": {json.dumps(tool["name"], ensure_ascii=False)}, "{form.arguments}": '
            schema = tool.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
            rules.append(f'tool_{n}: "{{" {_text(head)} args_{n} "}}"')
            rules.append(f"args_{n}: {_json(schema)}")
        return rules

    def _whole(self, start: str, rules: Sequence[str], *, may_think: bool = True) -> str:
        rules = [f"start: {start}", *rules]
        if self.thinking or (self.thinks and may_think):
            before = "thoughts" if self.thinking else f"({self._marker('<think>')} thoughts)?"
            end = self._marker("</think>")
            thoughts = (
                [f"thoughts: THOUGHT {end} SPACE"]
                if self._is_special("</think>")
                else ["thoughts: thought SPACE", f"thought[lazy]: THOUGHT {end}"]
            )
            rules = [f"start: {before} reply", f"reply: {start}", *rules[1:], *thoughts]
            rules += [f"THOUGHT: {_ANY_TEXT}", "SPACE: /[ \\n]{0,4}/"]
        return "\n".join(rules) + "\n"

    def _is_special(self, marker: str) -> bool:
        return self.special_id(marker) is not None

    def _marker(self, text: str) -> str:
        """The text, where what is one control token is written as its id."""
        bare = text.strip("\n")
        special = self.special_id(bare) if bare else None
        if special is None:
            return _text(text)
        before, _, after = text.partition(bare)
        return f"{_text(before)} <[{special}]> {_text(after)}".strip()


def _schema(request: ChatCompletionRequest) -> dict[str, Any] | None:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    return {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_ or {}


def _json(schema: dict[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _JSON})


def _text(text: str) -> str:
    """A literal; nothing at all for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""
