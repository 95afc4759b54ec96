"""The form of a reply that a request asks for, as a grammar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.tool_forms.form import Asked, ToolForm
from nat_plugin_evsys.policy.tool_forms.lark import Lark


@dataclass(frozen=True, slots=True)
class ReplyGrammar:
    """What a reply is held to.

    Attributes:
        text: in llguidance's dialect of Lark.
        ends: ids that may end the reply; None for all that end a turn.
        unheld: what of the tools' schemas has no effect.
    """

    text: str
    ends: list[int] | None
    unheld: list[str]


@dataclass(frozen=True, slots=True)
class ReplyForms:
    """Makes the grammars of one chat template's replies.

    Args:
        tool_form: how the model writes calls; None if that is unknown.
        special_id: the id of a marker that is one control token; None for plain text.
        thinks: whether the template knows ``<think>`` blocks, which may come before the form.
    """

    tool_form: ToolForm | None
    special_id: Callable[[str], int | None]
    thinks: bool = False

    def grammar(self, request: ChatCompletionRequest, *, thinking: bool = False) -> ReplyGrammar | None:
        """The grammar of the form that ``request.hints`` ask for; None if nothing is, or the model's form is unknown.

        Args:
            thinking: whether the prompt ends inside a ``<think>`` block.

        Raises:
            DataError: the model's form cannot write a call of one of the tools.
        """
        if not request.hints:
            return None
        asked = _asked(request)
        lark = Lark(self.special_id)
        if self.tool_form is not None and (asked.tools or self.tool_form.is_marked):
            reply = self.tool_form.reply(lark, asked)
        elif asked.schema is not None and not asked.tools:
            reply = lark.json(asked.schema)
        else:
            return None
        is_free = not asked.must_call and asked.schema is None  # its text may have thoughts
        start = reply if is_free and not thinking else self._with_thoughts(lark, reply, asked, thinking)
        return ReplyGrammar(lark.grammar(start), self._ends(asked), lark.unheld)

    def _ends(self, asked: Asked) -> list[int] | None:
        end = self.tool_form.call_end if self.tool_form is not None and asked.must_call else None
        special = None if end is None else self.special_id(end)
        return None if special is None else [special]

    def _with_thoughts(self, lark: Lark, reply: str, asked: Asked, thinking: bool) -> str:
        if not thinking and not (self.thinks and asked.thinks):
            return reply
        space = lark.rule("SPACE", "/[ \\n]{0,4}/")
        thoughts = f"{lark.text_until('</think>')} {space}"
        before = thoughts if thinking else f"({lark.marker('<think>')} {thoughts})?"
        return f"{before} ({reply})"


def _asked(request: ChatCompletionRequest) -> Asked:
    tools = [tool["function"] for tool in request.shown_tools]
    choice = request.tool_choice
    named = choice["function"]["name"] if isinstance(choice, dict) else None
    if named is not None:
        tools = [tool for tool in tools if tool["name"] == named]
    return Asked(
        tools=tools,
        must_call=named is not None or choice == "required",
        several=request.parallel_tool_calls is not False and named is None,
        thinks=named is None,
        schema=_schema(request),
    )


def _schema(request: ChatCompletionRequest) -> dict[str, Any] | None:
    asked = request.response_format
    if asked is None or asked.type == "text":
        return None
    return {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_ or {}
