"""What a JSON body would become is counted before it becomes anything."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.web.json_bodies import SMALL, JsonLimits, check_shape, parse_json

ROOMY = JsonLimits(bytes=1 << 30, values=1 << 30, containers=1 << 30, depth=1 << 30)
TEXTS = st.text(alphabet=st.sampled_from('ab\\"[]{},:/\n\u20ac\U0001f600')) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=30,
)


def commas(value: Any) -> int:
    """The commas of a value's JSON."""
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return max(len(items) - 1, 0) + sum(commas(item) for item in items)


def containers(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + sum(containers(item) for item in (value.values() if isinstance(value, dict) else value))


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((depth(item) for item in (value.values() if isinstance(value, dict) else value)), default=0)


@settings(deadline=None)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), st.booleans(), st.sampled_from([None, 2]))
def test_the_counts_are_exact_whatever_the_strings_hold(value: dict[str, Any], ascii_only: bool, indent: Any) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    check_shape(body, replace(ROOMY, containers=containers(value), depth=depth(value)))
    for name, count in (("containers", containers(value)), ("depth", depth(value))):
        with pytest.raises(Refusal):
            check_shape(body, replace(ROOMY, **{name: count - 1}))
    if (count := commas(value)) > 0:
        with pytest.raises(Refusal):
            check_shape(body, replace(ROOMY, values=count - 1))


BOMBS = {
    "arrays": (b'{"a": [' + b"[]," * 2_000_000 + b"[]]}", "has .* (values|arrays and objects)"),
    "objects": (b'{"a": [' + b"{}," * 2_000_000 + b"{}]}", "has .* (values|arrays and objects)"),
    "numbers": (b'{"a": [' + b"1," * 3_000_000 + b"1]}", "has more than .* values"),
    "strings": (b'{"a": [' + b'"",' * 2_000_000 + b'""]}', "has more than .* values"),
    "members": (b"{" + b'"":1,' * 1_500_000 + b'"":1}', "has more than .* values"),
    "cut off": (b'{"a": [' + b"[]," * 2_000_000, "has .* (values|arrays and objects)"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "hidden behind escapes": (b'{"a\\\\": [' + b"[]," * 2_000_000 + b"[]]}", "has .* (values|arrays and objects)"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_before_anything_is_made_of_it(name: str) -> None:
    body, said = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match=said) as caught:
            parse_json(body, SMALL)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status in (400, 413)
    assert peak < 6 * len(body) + (1 << 20)  # a few numbers for each character, and nothing of the objects


def test_text_full_of_commas_and_brackets_is_one_value() -> None:
    text = '[{,"\\' * 100_000
    assert parse_json(json.dumps({"content": text}).encode(), SMALL) == {"content": text}
