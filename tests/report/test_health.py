"""The figures of health: read by their names, judged by their thresholds, never guessed."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.report.health import FIGURES, Health, health
from nat_plugin_evsys.report.replies import ReplyNumbers


def row(epoch: int, metrics: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": epoch, "job": {"metrics": metrics or {}}, **columns}


def figure(title: str, rows: list[dict[str, Any]]) -> Health:
    return next(each for each in health(rows) if each.figure.title == title)


def test_a_figure_that_was_not_measured_says_so() -> None:
    found = figure("KL to the base model", [row(1), row(2)])
    assert (found.points, found.state, found.crossed_in) == ([], "not_measured", [])
    assert found.figure.names


def test_a_fixed_threshold() -> None:
    found = figure("KL to the sampler", [row(epoch, {"kl_v1:mean": value}) for epoch, value in ((1, 0.2), (2, 0.01))])
    assert (found.bound, found.crossed_in, found.state) == (0.15, [1], "ok")
    found = figure("KL to the sampler", [row(1, {"kl_v1:mean": 0.01}), row(2, {"kl_v1:mean": 0.2})])
    assert (found.crossed_in, found.state) == ([2], "crossed")


def test_a_threshold_relative_to_the_first_epoch() -> None:
    found = figure("Entropy", [row(epoch, {"entropy:mean": value}) for epoch, value in ((1, 2.0), (2, 0.5), (3, 0.1))])
    assert (found.bound, found.crossed_in, found.state) == (pytest.approx(0.2), [3], "crossed")
    assert figure("Entropy", [row(1, {"entropy:mean": 0.0})]).bound is None


def test_what_is_read_from_the_replies() -> None:
    numbers = ReplyNumbers(
        replies=40,
        rows=10,
        rows_with_signal=1,
        reward_mean=0.5,
        reward_min=0.0,
        reward_max=1.0,
        tokens_mean=12.5,
        calls=40,
        cut=10,
        empty=0,
    )
    rows = [
        row(
            1,
            replies=numbers.to_dict(),
            rollouts=40,
            failed_rollouts=1,
            staleness={"0": 10, "1": 30},
            calls=50,
            malformed_calls=5,
            prompts={"new": 10, "extended": 27, "changed": 2, "rewritten": 1},
        )
    ]
    values = {each.figure.title: each.points for each in health(rows)}
    assert values["Rows without a signal"] == [(1, pytest.approx(0.9))]
    assert values["Reply length"] == [(1, 12.5)]
    assert values["Replies cut off"] == [(1, 0.25)]
    assert values["Failed rollouts"] == [(1, 0.025)]
    assert values["Staleness"] == [(1, 0.75)]
    assert values["Malformed tool calls"] == [(1, 0.1)]
    assert values["Turns read as sampled"] == [(1, 0.9)]


def test_rows_of_other_events_and_values_that_are_no_numbers_are_left_out() -> None:
    rows = [{"event": "validation", "epoch": 0}, row(1, {"entropy:mean": None}), row(2, {"entropy:mean": float("nan")})]
    assert figure("Entropy", rows).points == []


def test_every_threshold_says_what_to_do() -> None:
    for each in FIGURES:
        assert each.meaning.endswith(".")
        assert (each.threshold is None) == (each.crossed == "")
