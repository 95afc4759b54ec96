"""What evaluators say of a dataset row that cannot be scored."""

from __future__ import annotations

from typing import Any

from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem


def is_missing(expected: Any) -> bool:
    """Whether a row has no expected answer.

    If a row lacks the answer key, NAT's data frame has NaN (if other rows have it) or "" (if none has it).
    """
    return expected is None or expected != expected or (isinstance(expected, str) and not expected.strip())


def no_answer(item: EvalInputItem) -> EvalOutputItem:
    """The outcome of a row without an expected answer."""
    return failure(item, "the row has no expected answer; fill the dataset's `structure.answer_key` field")


def failure(item: EvalInputItem, error: str) -> EvalOutputItem:
    """The outcome of an invalid row: no score, which NAT leaves out of the average, and ``error`` in both places."""
    return EvalOutputItem(id=item.id, score=None, reasoning={"error": error}, error=error)
