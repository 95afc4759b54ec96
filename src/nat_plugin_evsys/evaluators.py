"""Evaluators that ship with the package: rewards that need no judge."""

from __future__ import annotations

import re
from typing import Any

from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator

from nat_plugin_evsys.config.evaluator import EvsysExactMatchConfig


class ExactMatchEvaluator(BaseEvaluator):
    """Compares the workflow's output with the row's expected answer."""

    def __init__(self, config: EvsysExactMatchConfig) -> None:
        super().__init__(tqdm_desc="Exact match")
        self.config = config

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        """Score one row: 1.0 for a match, else 0.0.

        A row without an expected answer (or, with ``mode: regex``, with one that is no regular expression) is no wrong
        answer of the workflow: its ``error`` and ``reasoning["error"]`` say so and its score is None, which NAT leaves
        out of the average.
        """
        if _is_missing(item.expected_output_obj):
            return _failure(item, "the row has no expected answer; fill the dataset's `structure.answer_key` field")
        output, expected = "" if item.output_obj is None else str(item.output_obj), str(item.expected_output_obj)
        try:
            matched = matches(output, expected, self.config)
        except re.error as error:
            return _failure(item, f"the expected answer {expected!r} is no regular expression: {error}")
        return EvalOutputItem(
            id=item.id,
            score=float(matched),
            reasoning={"output": output, "expected": expected, "mode": self.config.mode},
        )


def matches(output: str, expected: str, config: EvsysExactMatchConfig) -> bool:
    """Whether ``output`` matches ``expected`` as ``config`` says; a regular expression itself is not normalised.

    Raises:
        re.error: ``mode: regex`` and ``expected`` is no regular expression.
    """
    if config.mode == "regex":
        text = " ".join(output.split()) if config.ignore_whitespace else output
        return re.search(expected, text, re.IGNORECASE if config.ignore_case else 0) is not None
    output, expected = _normalise(output, config), _normalise(expected, config)
    return expected in output if config.mode == "contains" else output == expected


def _normalise(text: str, config: EvsysExactMatchConfig) -> str:
    if config.ignore_whitespace:
        text = " ".join(text.split())
    return text.casefold() if config.ignore_case else text


def _is_missing(expected: Any) -> bool:
    # Where a row lacks the answer key, NAT's data frame gives NaN (other rows have it) or "" (no row has it).
    return expected is None or expected != expected or (isinstance(expected, str) and not expected.strip())


def _failure(item: EvalInputItem, error: str) -> EvalOutputItem:
    return EvalOutputItem(id=item.id, score=None, reasoning={"error": error}, error=error)
