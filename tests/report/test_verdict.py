"""Did it get better: the answer, the counts, and the curve."""

from __future__ import annotations

import pytest

from nat_plugin_evsys.report.findings import FindingId
from nat_plugin_evsys.report.verdict import comparison, curve, delivered, doubted, verdict
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.runs.state import RunState

BEFORE, AFTER = Collection("heldout", 0), Collection("heldout", 4)
ROWS = [f"r{number}" for number in range(20)]


def state(before: float | None, after: float | None, **fields: float) -> RunState:
    return RunState(heldout_reward_before=before, heldout_reward_after=after, **fields)


@pytest.mark.parametrize(
    ("solved", "answer", "begins"),
    [
        (range(20), "yes", "Yes. On 20 held-out rows the mean reward rose from 0.100 to 1.000 (+0.900; 95% interval"),
        (range(3), "unclear", "Not clearly. On 20 held-out rows the mean reward went from 0.100 to 0.150 (+0.050;"),
        (range(0), "unclear", "Not clearly."),
    ],
)
def test_the_answer_depends_on_how_sure_it_is(solved: range, answer: str, begins: str) -> None:
    rewards = {
        BEFORE: {row: float(number < 2) for number, row in enumerate(ROWS)},
        AFTER: {row: float(number in solved) for number, row in enumerate(ROWS)},
    }
    found = verdict(state(0.1, len(solved) / 20), [BEFORE, AFTER], rewards.__getitem__)
    assert found.answer == answer
    assert found.sentence.startswith(begins)
    assert found.rows["better"] == max(len(solved) - 2, 0)


def test_a_run_that_got_worse() -> None:
    rewards = {BEFORE: dict.fromkeys(ROWS, 0.75), AFTER: {row: 0.25 - 0.001 * n for n, row in enumerate(ROWS)}}
    found = verdict(state(0.75, 0.25), [BEFORE, AFTER], rewards.__getitem__)
    assert found.answer == "no"
    assert "fell from 0.750 to 0.2" in found.sentence
    assert "−0.5" in found.sentence
    assert found.rows == {"better": 0, "worse": 20, "same": 0}


def test_a_warm_start_is_told_apart_from_what_came_after_it() -> None:
    base = Collection("base", 0)
    rewards = {base: dict.fromkeys(ROWS, 0.0), BEFORE: dict.fromkeys(ROWS, 0.25), AFTER: dict.fromkeys(ROWS, 1.0)}
    found = verdict(state(0.25, 1.0, heldout_reward_base=0.0), list(rewards), rewards.__getitem__)
    assert "rose from 0.000 to 1.000" in found.sentence
    assert found.sentence.endswith("After the warm start alone it was 0.250.")
    assert (found.before.mean, found.warm_start.mean, found.rows["better"]) == (0.0, 0.25, 20)
    lowered = {**rewards, AFTER: dict.fromkeys(ROWS, 0.125)}
    worse = verdict(state(0.25, 0.125, heldout_reward_base=0.0), list(lowered), lowered.__getitem__)
    assert worse.sentence.endswith("it was 0.250, and training since then has lowered it.")
    assert worse.answer == "no"
    assert worse.sentence.startswith("Not by what came after the warm start. On 20 held-out rows the mean reward rose")
    assert "since the warm start changed it by −0.125" in worse.sentence
    rows = [{"event": "base", "epoch": 0, "reward": 0.0, "num_examples": 20}]
    rows += [{"event": "validation", "epoch": 0, "reward": 0.25, "num_examples": 20}]
    drawn = curve(rows, list(rewards), rewards.__getitem__)
    assert [(point["epochs"], point["mean"]) for point in drawn["base"] + drawn["heldout"]] == [(0, 0.0), (0, 0.25)]


@pytest.mark.parametrize(
    ("solved", "answer", "begins", "since", "tells"),
    [
        (
            20,
            "yes",
            "Yes. On 20 held-out rows the mean reward rose from 0.000 to 1.000",
            0.5,
            "by +0.500 (95% interval +",
        ),
        (12, "yes", "Yes. On 20", 0.1, "by +0.100 (95% interval −0.059 to +0.240, which includes no change)."),
        (
            10,
            "unclear",
            "Only by the warm start. On 20 held-out rows the mean reward rose from 0.000",
            0.0,
            "no change",
        ),
        (
            8,
            "unclear",
            "Only by the warm start. On 20",
            -0.1,
            "by −0.100 (95% interval −0.240 to +0.059, which includes",
        ),
        (
            2,
            "no",
            "Not by what came after the warm start. On 20",
            -0.4,
            "it was 0.500, and training since then has lowered it.",
        ),
    ],
)
def test_epochs_after_a_warm_start_are_judged_by_what_they_added(
    solved: int, answer: str, begins: str, since: float, tells: str
) -> None:
    def first(count: int) -> dict[str, float]:
        return {row: float(number < count) for number, row in enumerate(ROWS)}

    rewards = {Collection("base", 0): first(0), BEFORE: first(10), AFTER: first(solved)}
    found = verdict(state(0.5, solved / 20, heldout_reward_base=0.0), list(rewards), rewards.__getitem__)
    assert found.answer == answer
    assert found.sentence.startswith(begins)
    assert tells in found.sentence
    assert found.since_warm_start.mean == pytest.approx(since)


def test_a_warm_start_without_an_epoch_after_it_is_called_that() -> None:
    rewards = {Collection("base", 0): dict.fromkeys(ROWS, 0.0), BEFORE: dict.fromkeys(ROWS, 1.0)}
    found = verdict(state(1.0, 1.0, heldout_reward_base=0.0), list(rewards), rewards.__getitem__)
    assert (found.answer, found.warm_start.mean, found.since_warm_start) == ("yes", 1.0, None)
    assert found.sentence.endswith("So far only the warm start was measured.")


def test_training_rows_stand_in_for_missing_held_out_rows() -> None:
    first, last = Collection("train", 0), Collection("train", 4)
    rewards = {first: dict.fromkeys(ROWS, 0.0), last: dict.fromkeys(ROWS, 1.0)}
    found = verdict(state(None, None, train_reward_before=0.0, train_reward_after=1.0), [first, last], rewards.get)
    assert (found.kind, found.answer) == ("train", "yes")
    assert "set validation_dataset" in found.sentence


def test_means_without_rows_and_nothing_at_all() -> None:
    found = verdict(state(0.1, 0.5), [], {}.__getitem__)
    assert (found.answer, found.change) == ("unclear", None)
    assert "from 0.100 to 0.500" in found.sentence
    assert verdict(state(None, None), [], {}.__getitem__).answer == "unmeasured"


def test_the_curve_places_an_epoch_at_the_policy_that_sampled_it() -> None:
    rows = [
        {"event": "validation", "epoch": 0, "reward": 0.25, "num_examples": 4},
        {"event": "epoch", "epoch": 1, "reward_mean": 0.3, "reward_std": 0.4, "reward_min": 0.0, "reward_max": 1.0},
    ]
    found = curve(rows, [BEFORE], lambda collection: {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0})
    assert found["training"] == [{"epochs": 0, "mean": 0.3, "low": 0.0, "high": pytest.approx(0.7)}]
    (point,) = found["heldout"]
    assert (point["epochs"], point["mean"], point["count"]) == (0, 0.25, 4)
    assert point["low"] < 0.25 < point["high"]


def test_two_runs_are_compared_on_the_rows_that_both_have() -> None:
    low, high = dict.fromkeys(ROWS, 0.25), dict.fromkeys([*ROWS, "other"], 0.75)
    kinds = ("heldout", "heldout")
    assert comparison(kinds, (low, high)).startswith("B is better: on the same 20 held-out rows it earned 0.500 more")
    assert comparison(kinds, (high, low)) == comparison(kinds, (low, high)).translate(str.maketrans("AB", "BA"))
    assert comparison(kinds, (high, low)).startswith("A is better")
    assert comparison(kinds, (low, low)).startswith("No clear difference")
    assert "not measured on the same rows" in comparison(("heldout", "train"), (low, low))
    assert "not measured on the same rows" in comparison(kinds, (low, {"x": 1.0}))


def test_a_reward_that_is_won_without_the_task_is_no_yes() -> None:
    rewards = {BEFORE: dict.fromkeys(ROWS, 0.0), AFTER: dict.fromkeys(ROWS, 1.0)}
    found = verdict(state(0.0, 1.0), list(rewards), rewards.__getitem__)
    for finding in (FindingId.ONE_ANSWER, FindingId.HELDOUT_SEVERAL):
        doubt = doubted(found, [FindingId.CUT_OFF, finding])
        assert doubt.answer == "unclear"
        assert doubt.sentence.startswith(
            "The reward rose, but it is won without solving the task: see the warning. On 20"
        )
    assert doubted(found, [FindingId.CUT_OFF, FindingId.SEVERAL_ANSWERS]) is found


def test_a_policy_that_was_given_up_is_not_what_the_run_came_to() -> None:
    training = Collection("train", 4)
    collections = [BEFORE, Collection("heldout", 2), AFTER, training]
    assert delivered(collections, {}) == collections
    assert delivered(collections, {4: 2}) == [BEFORE, Collection("heldout", 2), Collection("heldout", 2), training]
    assert delivered(collections, {4: 0}) == [BEFORE, Collection("heldout", 2), BEFORE, training]
    assert delivered(collections, {4: 3}) == collections, "what this one said was not kept"
    rewards = {BEFORE: dict.fromkeys(ROWS, 0.5), AFTER: dict.fromkeys(ROWS, 0.0)}
    found = verdict(state(0.5, 0.5), delivered([BEFORE, AFTER], {4: 0}), rewards.__getitem__)
    assert (found.answer, found.after, found.rows["same"]) == ("unclear", found.before, len(ROWS))
