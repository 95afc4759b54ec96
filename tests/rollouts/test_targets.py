"""Which calls of a rollout belong to the functions that are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.targets import targeted

MADE_IN = [["<workflow>", "planner"], ["<workflow>", "planner", "tools__search"], ["<workflow>"], []]


@pytest.mark.parametrize(
    ("functions", "chosen"),
    [
        (["<workflow>"], [0, 1, 2, 3]),
        (["planner"], [0, 1]),
        (["tools__search"], [1]),
        (["tools"], [1]),
        (["solver"], []),
        (["tools", "planner", "<workflow>"], [0, 1, 2, 3]),
    ],
)
def test_a_call_belongs_to_every_function_that_it_was_made_in(
    call: Callable[..., Any], functions: list[str], chosen: list[int]
) -> None:
    calls = [call([1], [2], functions=names) for names in MADE_IN]
    attempt = Attempt("row", "run", calls, 1.0, None, None, step_rewards=[0.0, 1.0, 2.0, 3.0])
    kept, steps, others = targeted(attempt, functions)
    assert kept == [calls[number] for number in chosen]
    assert steps == [float(number) for number in chosen]
    assert others == [made for number, made in enumerate(calls) if number not in chosen]
