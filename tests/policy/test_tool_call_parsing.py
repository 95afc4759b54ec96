"""Tool calls are found whatever the pieces the text comes in, and malformed ones are never lost."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.policy.tool_calls import assemble
from nat_plugin_evsys.policy.tool_forms.families import FORMS as FAMILIES
from nat_plugin_evsys.policy.tool_forms.families import create_parser

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


CASES = json.loads((Path(__file__).parent / "tool_calls.json").read_text(encoding="utf-8"))["cases"]
SAY = {"type": "function", "function": {"name": "say", "parameters": {"properties": {"t": {"type": "string"}}}}}
FORMS = {family.name: family() for family in FAMILIES}


def parse(
    text: str, tool_format: Any = "hermes", thinking: bool = False, cuts: list[int] | None = None, **options: Any
) -> Any:
    return read(text, tool_format, thinking, cuts, **options)[0]


def read(
    text: str, tool_format: Any = "hermes", thinking: bool = False, cuts: list[int] | None = None, **options: Any
) -> tuple[Any, int]:
    """The reply, and what looked like a call and was none."""
    parser = create_parser(FORMS[tool_format], tools=[SAY], reply_id="r", thinking=thinking, **options)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    pieces = [piece for a, b in pairwise(edges) for piece in parser.feed(text[a:b])]
    return assemble(pieces + parser.finish()), parser.malformed


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
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
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


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_every_familys_forms(case: dict[str, Any]) -> None:
    text = case["reply"]
    reply, malformed = read(text, case["form"])
    assert calls(reply) == [tuple(call) for call in case["calls"] or []]
    content = text if case["calls"] is None else case.get("content", "")
    assert (reply.content or "") == content
    for cuts in ([len(text) // 2], list(range(len(text)))):
        assert read(text, case["form"], cuts=cuts) == (reply, malformed)
    plain = {"call inside thoughts: text", "Llama: an answer in JSON", "pythonic: a list as the answer"}
    expected = case["calls"] is None and case["case"] not in plain
    assert bool(malformed) == (
        expected or case["case"] in ("a broken call, then a good one", "Harmony: arguments that are no JSON")
    )


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "content"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.\n", False, "Two and two.", "Four.\n"),
        ("Two and two.\n</think>\n\nFour.", True, "Two and two.", "Four."),
        ("I never stop thinking", True, "I never stop thinking", ""),
        ("Four.", False, None, "Four."),
        (f"<think>{CALL}</think>\n\n{CALL}", False, CALL, None),
        ("<think>\n\n</think>\n\nFour.", False, None, "Four."),
        ("<think>a</think>b<think>c</think>d", False, "a\nc", "bd"),
    ],
)
def test_thoughts_are_split_off(text: str, thinking: bool, reasoning: str | None, content: str | None) -> None:
    for cuts in ([], list(range(len(text)))):
        reply = parse(text, thinking=thinking, cuts=cuts, split_thoughts=True)
        assert (reply.reasoning, reply.content) == (reasoning, content)
        assert len(reply.tool_calls) == (content is None)


@given(
    parts=st.lists(
        st.sampled_from(
            sorted(
                {part for case in CASES for part in re.split(r"(<[^>]*>|\[[A-Z_]+\]|[{}\[\]])", case["reply"]) if part}
            )
        ),
        max_size=16,
    ),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
    form=st.sampled_from(sorted(FORMS)),
    thinking=st.booleans(),
    split=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_no_form_depends_on_the_pieces(
    parts: list[str], cuts: list[int], form: str, thinking: bool, split: bool
) -> None:
    text = "".join(parts)
    whole = read(text, form, thinking, split_thoughts=split)
    assert read(text, form, thinking, cuts, split_thoughts=split) == whole
    json.dumps(whole[0].to_message(), ensure_ascii=False, allow_nan=False).encode()


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


@pytest.mark.parametrize("odd", [{"type": ["string", {}]}, {"type": {}}, {"enum": 5}, {"anyOf": [5]}, 5])
def test_a_parameter_whose_schema_is_none_is_any_value(odd: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": odd}}}}
    parser = create_parser(FORMS["qwen3_xml"], tools=[tool], reply_id="r")
    text = "<tool_call>\n<function=f>\n<parameter=a>\n5\n</parameter>\n</function>\n</tool_call>"
    assert calls(assemble(parser.feed(text) + parser.finish())) == [("f", {"a": 5})]


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
