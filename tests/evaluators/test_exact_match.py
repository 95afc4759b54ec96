import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from nat.data_models.evaluator import EvalInput, EvalInputItem
from pydantic import ValidationError

from nat_plugin_evsys.config import EvsysExactMatchConfig
from nat_plugin_evsys.evaluators.exact_match import ExactMatchEvaluator

TEAMS = {"mode": "one_of", "choices": ["network", "accounts", "accounts payable"]}


def item(output: Any, expected: Any) -> EvalInputItem:
    return EvalInputItem(
        id="1", input_obj="q", expected_output_obj=expected, output_obj=output, full_dataset_entry={"id": "1"}
    )


@pytest.mark.parametrize(
    ("settings", "output", "expected", "score"),
    [
        ({}, "  Please go\n to desk 12. ", "please go to desk 12.", 1.0),
        ({}, "Please go to desk 12. Now.", "Please go to desk 12.", 0.0),
        ({}, "", "x", 0.0),
        ({}, None, "x", 0.0),
        ({}, "12", 12, 1.0),
        ({}, "['x', 'y']", np.array(["x", "y"], dtype=object), 1.0),
        ({"ignore_case": False}, "Desk", "desk", 0.0),
        ({"ignore_whitespace": False}, "desk ", "desk", 0.0),
        ({"mode": "contains"}, "Go to DESK 12 now", "desk 12", 1.0),
        ({"mode": "contains"}, "desk", "desk 12", 0.0),
        ({"mode": "regex"}, "Go to desk 12", r"desk \d+$", 1.0),
        ({"mode": "regex", "ignore_case": False}, "Go to Desk 12", r"desk \d+", 0.0),
        ({"mode": "exact"}, "desk 12", r"desk \d+", 0.0),
        (TEAMS, "Network", "network", 1.0),
        (TEAMS, "I would ask the NETWORK team; network, yes.", "network", 1.0),
        (TEAMS, "network, accounts, accounts payable", "network", 0.0),
        (TEAMS, "accounts", "network", 0.0),
        (TEAMS, "the networking people", "network", 0.0),
        (TEAMS, "", "network", 0.0),
        (TEAMS, "Accounts\n payable.", "accounts payable", 1.0),
        (TEAMS, "Accounts payable.", "accounts", 0.0),
        ({**TEAMS, "ignore_case": False}, "Network", "network", 0.0),
    ],
)
async def test_scores(settings: dict[str, Any], output: Any, expected: Any, score: float) -> None:
    scored = await ExactMatchEvaluator(EvsysExactMatchConfig(**settings)).evaluate_item(item(output, expected))
    assert (scored.score, scored.error) == (score, None)


@pytest.mark.parametrize("expected", [None, "", "  ", math.nan, np.float32("nan"), pd.NaT, pd.NA])
async def test_a_row_without_an_answer_is_an_error_and_no_score(expected: Any) -> None:
    evaluator = ExactMatchEvaluator(EvsysExactMatchConfig())
    output = await evaluator.evaluate(EvalInput(eval_input_items=[item("x", expected), item("x", "x")]))
    broken, good = output.eval_output_items
    assert broken.score is None
    assert "no expected answer" in (broken.error or "")
    assert broken.reasoning["error"] == broken.error
    assert good.score == 1.0
    assert output.average_score == 1.0


async def test_a_broken_regular_expression_is_an_error_and_no_score() -> None:
    scored = await ExactMatchEvaluator(EvsysExactMatchConfig(mode="regex")).evaluate_item(item("x", "(x"))
    assert scored.score is None
    assert "not a regular expression" in (scored.error or "")


async def test_an_answer_that_is_no_choice_is_an_error_and_no_score() -> None:
    scored = await ExactMatchEvaluator(EvsysExactMatchConfig(**TEAMS)).evaluate_item(item("x", "payroll"))
    assert scored.score is None
    assert "'payroll' is not among the evaluator's choices ['network'" in (scored.error or "")


async def test_the_reasoning_says_which_choices_were_named() -> None:
    evaluator = ExactMatchEvaluator(EvsysExactMatchConfig(**TEAMS))
    scored = await evaluator.evaluate_item(item("Network or accounts.", "network"))
    assert scored.reasoning["named"] == ["accounts", "network"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "one_of"}, "needs `choices`"),
        ({"mode": "one_of", "choices": ["network"]}, "two or more"),
        ({"mode": "one_of", "choices": ["network", " "]}, "empty string"),
        ({"choices": ["network", "accounts"]}, "choices has no effect with mode: exact"),
    ],
)
def test_choices_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvsysExactMatchConfig(**settings)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="ignore_cas"):
        EvsysExactMatchConfig(ignore_cas=True)
    with pytest.raises(ValidationError, match="mode"):
        EvsysExactMatchConfig(mode="fuzzy")
