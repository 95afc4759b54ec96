"""Tool calls are found whatever the pieces the text comes in, and malformed ones are never lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.policy.tool_calls import assemble, create_parser

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def parse(text: str, tool_format: Any = "hermes", thinking: bool = False, cuts: list[int] | None = None) -> Any:
    parser = create_parser(tool_format, reply_id="r", thinking=thinking)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    pieces = [piece for a, b in pairwise(edges) for piece in parser.feed(text[a:b])]
    return assemble(pieces + parser.finish())


def calls(reply: Any) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("", "", []),
        ("Hello.\n", "Hello.\n", []),
        (CALL, None, [("add", {"a": 1, "b": 2})]),
        (f"\n\n{CALL}\n", None, [("add", {"a": 1, "b": 2})]),
        (f"Let me add.\n{CALL}", "Let me add.", [("add", {"a": 1, "b": 2})]),
        (f"Let me add.\n\n{CALL}", "Let me add.\n", [("add", {"a": 1, "b": 2})]),
        (f"{CALL}\n{CALL}", None, [("add", {"a": 1, "b": 2})] * 2),
        (f"{CALL}\nDone.\n", "\nDone.\n", [("add", {"a": 1, "b": 2})]),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call>', None, [("now", {})]),
        (f"<think>{CALL}</think>{CALL}", f"<think>{CALL}</think>", [("add", {"a": 1, "b": 2})]),
        (f"<think>never closed {CALL}", f"<think>never closed {CALL}", []),
        (f"<tool_call>oops {CALL}", "<tool_call>oops ", [("add", {"a": 1, "b": 2})]),
    ],
)
def test_hermes(text: str, content: str | None, expected: list[Any]) -> None:
    reply = parse(text)
    assert reply.content == content
    assert calls(reply) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "add", "arguments": {"a": 1}}',
        '<tool_call>{"name": "add"}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {}, "id": 1}</tool_call>',
        "<tool_call>" + "[" * 100_000 + "</tool_call>",
        "<tool_call>[1, 2]</tool_call> \n",
        "a </tool_call> <tool_cal <think",
        "<tool_call><tool_call><tool_call>",
    ],
)
def test_malformed_blocks_stay_in_the_content(text: str) -> None:
    reply = parse(text)
    assert reply.content == text
    assert reply.tool_calls == []


@given(
    parts=st.lists(
        st.sampled_from(
            [CALL, "<tool_call>", "</tool_call>", "<think>", "</think>", "<", "\n", "  ", "text", "{", "é", "</", "<t"]
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
    thinking=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_pieces_do_not_matter(parts: list[str], cuts: list[int], thinking: bool) -> None:
    text = "".join(parts)
    whole = parse(text, thinking=thinking)
    assert parse(text, thinking=thinking, cuts=cuts) == whole
    # Nothing but white space beside blocks and the blocks themselves is missing from the content.
    blocks = sum(len(CALL.replace("\n", "").replace(" ", "")) for _ in whole.tool_calls)
    squeezed = "".join((whole.content or "").split())
    assert len(squeezed) + blocks == len("".join(text.split()))


def test_thinking_that_the_prompt_opened() -> None:
    reply = parse(f"I may write {CALL}\n</think>\n\n{CALL}", thinking=True)
    assert reply.content == f"I may write {CALL}\n</think>\n"
    assert len(reply.tool_calls) == 1


def test_ids_are_distinct_and_repeatable() -> None:
    first, second = parse(f"{CALL}{CALL}").tool_calls
    assert first.id != second.id
    assert parse(f"{CALL}{CALL}").tool_calls[0].id == first.id


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ('{"name": "add", "parameters": {"a": 1}}', None, [("add", {"a": 1})]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', None, [("add", {"a": 1})]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', None, [("f", {}), ("g", {})]),
        ('{"name": "f", "parameters": {}} and text', '{"name": "f", "parameters": {}} and text', []),
        ('{"answer": 3}', '{"answer": 3}', []),
        ("{broken", "{broken", []),
        ("Just text {", "Just text {", []),
        ("", "", []),
    ],
)
def test_llama3_json(text: str, content: str | None, expected: list[Any]) -> None:
    for cuts in ([], list(range(len(text)))):
        reply = parse(text, "llama3_json", cuts=cuts)
        assert (reply.content, calls(reply)) == (content, expected)
