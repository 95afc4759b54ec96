"""Replicas as their callers see them: how fast each is, and how often it died."""

from __future__ import annotations

import pytest

from nat_plugin_evsys.cli.status_table import status_table
from nat_plugin_evsys.replicas.members import Member, stragglers_of


def member(*seconds: float) -> Member:
    """After passes of 100 tokens that took so long."""
    made = Member(actor=None)
    for each in seconds:
        made.computed(100, each, pid=1)
    return made


FAST, SLOW = [1.0] * 8, [2.5] * 8


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param([member(*FAST), member(*FAST)], [], id="equal"),
        pytest.param([member(*FAST), member(*SLOW), member(*FAST)], [1], id="one is slow"),
        pytest.param([member(*FAST), member(2.5, 2.5, 2.5)], [], id="too early to say"),
        pytest.param([member(*FAST), member(30.0, *FAST, *FAST)], [], id="its first pass was slow"),
        pytest.param([member(*FAST), member(*SLOW, *FAST)], [], id="it has recovered"),
        pytest.param([member(), member()], [], id="nothing was computed"),
    ],
)
def test_a_straggler_is_named_after_some_passes(members: list[Member], expected: list[int]) -> None:
    assert stragglers_of(members) == expected


def test_another_process_is_a_restart_that_starts_its_speed_again() -> None:
    one = member(*SLOW)
    one.computed(100, 1.0, pid=2)
    assert (one.restarts, one.passes, one.speed, one.tokens) == (1, 1, 100.0, 900)


def test_the_status_names_a_straggler_and_replicas_that_are_being_started() -> None:
    facts = {"base_model": "m", "host": "h", "device": "cpu", "memory": 3 << 20, "tokens": 5, "sampling": 0}
    replicas = [
        {"replica": 0, **facts, "state": "up", "restarts": 0, "tokens_per_second": 1234.5, "straggles": True},
        {"replica": 1, **facts, "state": "starting", "restarts": 2, "tokens_per_second": None, "straggles": False},
        {"replica": 2, "base_model": "m", **Member(actor=None).row(), "state": "starting", "straggles": False},
    ]
    empty = {name: {} for name in ("queued", "sampling", "tokens_per_second", "tokens", "memory")}
    rest = {"base_models": ["m"], "sessions": 0, "long_polls": 0, "uptime": 0, "models": []}
    lines = status_table({**empty, **rest, "replicas": replicas}).splitlines()
    rows = [line.split() for line in lines if line.startswith(("0 ", "1 ", "2 "))]
    assert rows == [
        ["0", "m", "straggles", "h", "cpu", "3.0", "MiB", "1,234", "5", "0", "0"],
        ["1", "m", "starting", "h", "cpu", "3.0", "MiB", "-", "5", "0", "2"],
        ["2", "m", "starting", "-", "-", "-", "-", "0", "0", "0"],
    ]
