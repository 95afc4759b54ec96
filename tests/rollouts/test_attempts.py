"""Which rows an epoch's attempts teach nothing about, and what another round of attempts replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from nat_plugin_evsys.calls import Call, DropReason
from nat_plugin_evsys.rollouts.attempts import Attempt, rows_without_signal, with_replacements

CALL = Call("id", 0, None, None, 0, [1], [2], [-1.0], "stop", 1.0, 1.0, [], [], {}, 0)


def attempt(reward: float | None, number: int = 0, row: str = "row", **changes: Any) -> Attempt:
    lost = None if reward is not None else DropReason.EVALUATOR_ERROR
    return Attempt(row, f"{row}/{number}", [CALL], reward, lost, None, number=number, **changes)


@pytest.mark.parametrize(
    ("attempts", "without"),
    [
        ([attempt(0.0), attempt(1.0)], False),
        ([attempt(0.5), attempt(0.5)], True),
        ([attempt(0.5), attempt(0.5, step_rewards=[1.0])], False),
        ([attempt(0.5, step_rewards=[1.0]), attempt(0.5, step_rewards=[1.0])], True),
        ([attempt(0.5), attempt(None), attempt(0.5)], True),
        ([attempt(0.5), attempt(None)], False),  # nothing to compare with: the next round would fail as well
        ([attempt(0.0, replaced=True), attempt(1.0), attempt(1.0)], True),
    ],
)
def test_rows_without_signal(attempts: Sequence[Attempt], without: bool) -> None:
    assert rows_without_signal([*attempts, attempt(0.0, row="other"), attempt(1.0, row="other")]) == ["row"] * without


@pytest.mark.parametrize(("discount", "silent"), [(1.0, True), (0.9, False)])
def test_equal_rewards_after_different_numbers_of_calls_have_a_signal_with_a_discount(
    discount: float, silent: bool
) -> None:
    rows = [attempt(1.0), replace(attempt(1.0), calls=[CALL, CALL])]
    assert (rows_without_signal(rows, discount) == ["row"]) is silent
    assert rows_without_signal([rows[1], rows[1]], discount) == ["row"]


@pytest.mark.parametrize(("rewards", "left"), [([None, None], [0.0, 0.0]), ([1.0, None], [0.0, 0.0, 1.0])])
def test_a_round_that_fails_replaces_nothing(rewards: list[float | None], left: list[float]) -> None:
    again = [attempt(reward, number) for number, reward in enumerate(rewards)]
    attempts = with_replacements([attempt(0.0, 0), attempt(0.0, 1)], again, 1)
    assert [each.reward for each in attempts if each.untrainable is None] == left


def test_each_round_replaces_the_one_before() -> None:
    first = [attempt(0.0, 0), attempt(0.0, 1), attempt(0.0, 0, "other"), attempt(1.0, 1, "other")]
    second = with_replacements(first, [attempt(1.0, 0), attempt(1.0, 1)], 1)
    third = with_replacements(second, [attempt(0.0, 0), attempt(1.0, 1)], 2)
    assert [(each.row_id, each.number, each.round, each.reward) for each in third if not each.replaced] == [
        ("other", 0, 0, 0.0),
        ("other", 1, 0, 1.0),
        ("row", 4, 2, 0.0),
        ("row", 5, 2, 1.0),
    ]
    assert {each.untrainable for each in third if each.replaced} == {DropReason.REPLACED_GROUP}
    assert len({(each.row_id, each.number) for each in third}) == len(third) == 8
