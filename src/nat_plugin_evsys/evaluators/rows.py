"""What evaluators say of a dataset row that cannot be scored."""

from __future__ import annotations

from typing import Any

from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem

from nat_plugin_evsys.cells import is_blank, without_arrays


def expected_of(item: EvalInputItem) -> Any:
    """The row's expected answer, lists as lists in every format of datasets; None if it has none.

    If a row lacks the answer key, NAT's data frame has NaN (if other rows have it) or "" (if none has it).
    """
    return None if is_blank(item.expected_output_obj) else without_arrays(item.expected_output_obj)


def no_answer(item: EvalInputItem) -> EvalOutputItem:
    """The outcome of a row without an expected answer."""
    return failure(item, "the row has no expected answer; fill the dataset's `structure.answer_key` field")


def failure(item: EvalInputItem, error: str) -> EvalOutputItem:
    """The outcome of an invalid row: no score, which NAT leaves out of the average, and ``error`` in both places."""
    return EvalOutputItem(id=item.id, score=None, reasoning={"error": error}, error=error)
