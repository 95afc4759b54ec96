"""Attempts as replies, for the report's diagnosis and tables and for trackers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.cells import is_absent, without_arrays
from nat_plugin_evsys.report.questions import question_text
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.episodes import text_of

VERDICT_LENGTH = 200
"""Characters of an evaluator's reasoning that are kept."""


def reply_of(attempt: Attempt) -> Reply:
    """The readable part of an attempt, without its tokens."""
    text = _text(attempt.output) or _last_words(attempt.calls)
    expected = _text(attempt.expected) or None
    return Reply(
        row=attempt.row_id,
        question=question_text(attempt.question) or _text(attempt.question),
        expected=expected,
        text=text,
        reward=attempt.reward,
        verdict=attempt.error or _verdict(attempt.reasoning, shown=(text, expected)),
        tokens=sum(len(call.output_ids) for call in attempt.calls),
        calls=len(attempt.calls),
        cut=sum(call.stop_reason == "length" for call in attempt.calls),
    )


def _text(value: Any) -> str:
    if is_absent(value):
        return ""
    return value if isinstance(value, str) else json.dumps(without_arrays(value), ensure_ascii=False, default=str)


def _last_words(calls: Sequence[Call]) -> str:
    """What the policy said last, its tool calls included."""
    if not calls:
        return ""
    reply = max(calls, key=lambda call: (call.sequence, call.index)).reply
    functions = [tool_call.get("function") or {} for tool_call in reply.get("tool_calls") or []]
    wanted = [f"{function.get('name')}({function.get('arguments')})" for function in functions]
    return " ".join(filter(None, (text_of(reply.get("content")), *wanted)))


def _verdict(reasoning: Any, shown: tuple[str | None, ...]) -> str:
    """An evaluator's reasoning in one line, without what is shown beside it anyway."""
    if isinstance(reasoning, dict):
        told = {name: _text(value) for name, value in reasoning.items() if _text(value) not in ("", *shown)}
        reasoning = ", ".join(f"{name}: {value}" for name, value in told.items())
    line = " ".join(_text(reasoning).split())
    return line if len(line) <= VERDICT_LENGTH else f"{line[: VERDICT_LENGTH - 2]} …"
