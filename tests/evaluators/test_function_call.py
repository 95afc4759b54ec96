from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import bfcl
import numpy as np
import pytest
from nat.data_models.evaluator import EvalInputItem

from nat_plugin_evsys.config import EvsysFunctionCallConfig
from nat_plugin_evsys.evaluators.accepted_calls import AcceptedCall, Call, why_calls_differ
from nat_plugin_evsys.evaluators.function_call import FunctionCallEvaluator, read_accepted

ADD = [{"add": {"a": [1], "b": [2, 2.5], "unit": ["", "cm"]}}]
TRIP = [{"book": {"to": ["New York, NY"], "days": [["May 1", "May 2"]], "who": [{"name": ["Ann"], "age": [30, ""]}]}}]


async def score(output: Any, expected: Any, **settings: Any) -> Any:
    item = EvalInputItem(
        id="1", input_obj="q", expected_output_obj=expected, output_obj=output, full_dataset_entry={"id": "1"}
    )
    return await FunctionCallEvaluator(EvsysFunctionCallConfig(**settings)).evaluate_item(item)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    ("output", "expected", "why"),
    [
        ([call("add", a=1, b=2)], ADD, None),
        ([call("add", a=1, b=2.5, unit="CM")], ADD, None),
        ([call("add", a=1.0, b=2)], ADD, None),
        (call("add", a=1, b=2), ADD, None),
        ([{"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}], ADD, None),
        ([call("sub", a=1, b=2)], ADD, "called `sub`, expected `add`"),
        ([call("add", a=1)], ADD, "argument `b` is missing"),
        ([call("add", a=1, b=3)], ADD, "argument `b` is 3, expected one of [2, 2.5]"),
        ([call("add", a="1", b=2)], ADD, "argument `a` is '1'"),
        ([call("add", a=True, b=2)], ADD, "argument `a` is True"),
        ([call("add", a=1, b=2, c=3)], ADD, "`add` has no argument `c`"),
        ([call("add", a=1, b=2), call("add", a=1, b=2)], ADD, "2 function calls, expected 1"),
        ([], ADD, "0 function calls, expected 1"),
        ("I would add them.", ADD, "the output is not JSON"),
        ("3", ADD, "the output is not a list of function calls"),
        ([call("add", a=1, b=2), "and so on"], ADD, "the output has 'and so on', which is not a function call"),
        (None, ADD, "the output is not JSON"),
        ([call("book", to="new york ny", days=["may-1", "may-2"], who={"name": "ann"})], TRIP, None),
        ([call("book", to="New York, NY", days=["May 2", "May 1"], who={"name": "Ann"})], TRIP, "argument `days`"),
        ([call("book", to="New York, NY", days=["May 1", "May 2"], who={"age": 30})], TRIP, "argument `who`"),
        ([call("book", to="New York, NY", days="May 1", who={"name": "Ann"})], TRIP, "argument `days`"),
    ],
)
async def test_scores_and_says_why(output: Any, expected: Any, why: str | None) -> None:
    text = output if output is None or isinstance(output, str) else json.dumps(output)
    scored = await score(text, json.dumps(expected))
    assert scored.error is None
    assert scored.score == (1.0 if why is None else 0.0)
    assert scored.reasoning["why"].startswith(why or "accepted")


async def test_several_calls_come_in_any_order_unless_it_matters() -> None:
    both = [{"f": {"x": [1]}}, {"f": {"x": [2]}}]
    turned = json.dumps([call("f", x=2), call("f", x=1)])
    assert (await score(turned, both)).score == 1.0
    assert (await score(turned, both, ignore_order=False)).score == 0.0
    assert (await score(json.dumps([call("f", x=1), call("f", x=1)]), both)).score == 0.0


async def test_accepted_calls_may_be_lists_of_a_parquet_file() -> None:
    accepted = np.array([{"add": {"a": np.array([1]), "b": np.array([2, 3])}}], dtype=object)
    assert (await score(json.dumps([call("add", a=1, b=3)]), accepted)).score == 1.0


@pytest.mark.parametrize("expected", [None, math.nan, "", "no JSON", "{}", '["f"]', '[{"f": {"x": 1}}]'])
async def test_a_row_that_is_wrong_itself_is_an_error_and_no_score(expected: Any) -> None:
    scored = await score("[]", expected)
    assert scored.score is None
    assert "expected answer" in (scored.error or "")


def attempts(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A right call and many that may be wrong: ``{name: arguments}``."""
    ((name, accepted),) = row["ground_truth"][0].items()
    values = {key: each[0] for key, each in accepted.items() if each and each[0] != "" and not of_objects(each[0])}
    yield {name: values}
    yield {name + "_": values}
    yield {name: {**values, "nonsense": 1}}
    for key, value in values.items():
        yield {name: {other: kept for other, kept in values.items() if other != key}}
        yield {name: {**values, key: "somewhere else"}}
        yield {name: {**values, key: [value]}}
        yield {name: {**values, key: not value}}
        if isinstance(value, str):
            yield {name: {**values, key: f" {value.upper()}. "}}
        if isinstance(value, list):
            yield {name: {**values, key: value[::-1]}}
        if isinstance(value, int | float):
            yield {name: {**values, key: value + 1}}


def of_objects(value: Any) -> bool:
    """Objects have a list of values in each field, so an accepted one is not itself an argument."""
    return isinstance(value, dict) or (isinstance(value, list) and any(map(of_objects, value)))


def test_the_leaderboards_own_checker_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    checker, verdicts = bfcl.Checker(monkeypatch), []
    for row in bfcl.rows("simple_python"):
        accepted = read_accepted(row["ground_truth"])
        for attempt in attempts(row):
            calls = [Call(name, arguments) for name, arguments in attempt.items()]
            verdict = why_calls_differ(calls, accepted, ignore_order=True) is None
            assert verdict == checker.accepts(row, [attempt]), (row, attempt)
            verdicts.append(verdict)
    assert len(verdicts) > 4000
    assert 400 < sum(verdicts) < len(verdicts) / 2


def test_an_accepted_call_is_written_as_the_data_set_writes_it() -> None:
    assert [AcceptedCall("f", {"x": [1, 2]}).to_json()] == [{"f": {"x": [1, 2]}}]
