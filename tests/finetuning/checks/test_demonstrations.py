"""Demonstrations that begin otherwise than the workflow's prompts."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.finetuning.checks.demonstrations import PromptCheck
from nat_plugin_evsys.rollouts.attempts import Attempt


def messages(system: Any = None) -> list[dict[str, Any]]:
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": "My wifi is broken."}]


def call(sent: list[dict[str, Any]]) -> Call:
    return Call("c", 0, "run", None, 0, [1], [2], [-0.5], "stop", 1.0, 1.0, sent, [], {"role": "assistant"}, 0)


def attempts(*systems: Any) -> list[Attempt]:
    calls = [call(messages(system)) for system in systems]
    return [Attempt("row", "run", [call], 1.0, None, None) for call in calls]


# The demonstrations' system prompts, those of the rollouts, and words of what is said (none: nothing).
# fmt: off
CASES: dict[str, tuple[list[Any], list[Any], list[str]]] = {
    "equal": (["Help."], ["Help.", "Help."], []),
    "equal but for spaces and parts": ([" Help.\n"], [[{"type": "text", "text": "Help."}]], []),
    "none at all": ([None], [None], []),
    "missing in one": (["Help.", None], ["Help.\nIn one word."],
                       ["2 of 2", '"Help."', '"Help."']),
    "missing in all": ([None, None], ["Answer in one word.\nBe kind."],
                       ["2 of 2", "has no system prompt", '"Answer in one word."']),
    "too many": (["Help.", "Help."], [None], ["2 of 2", '"Help."', "sends has no system prompt"]),
    "the workflow's differ by row": ([None], ["Row 1.", "Row 2."], []),
    "no rollout has made a call": ([None], [], []),
    "no warm start": ([], ["Help."], []),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_what_is_said_once(name: str) -> None:
    demonstrations, sent, words = CASES[name]
    check = PromptCheck([messages(system) for system in demonstrations])
    said = check.compare(attempts(*sent))
    assert (said is None) == (not words)
    for word in words:
        assert word in (said or "")
    if sent:
        assert check.compare(attempts(*sent)) is None
