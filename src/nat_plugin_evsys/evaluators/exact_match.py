"""``evsys_exact_match``: the workflow's output against the row's expected answer."""

from __future__ import annotations

import re
from typing import Any

from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator

from nat_plugin_evsys.config.evaluator import EvsysExactMatchConfig
from nat_plugin_evsys.evaluators.rows import expected_of, failure, no_answer


class ExactMatchEvaluator(BaseEvaluator):
    """Compares the workflow's output with the row's expected answer."""

    def __init__(self, config: EvsysExactMatchConfig) -> None:
        super().__init__(tqdm_desc="Exact match")
        self.config = config

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        """Score one row: 1.0 for a match, else 0.0.

        A row without an expected answer (or, with ``mode: regex``, with an invalid regular expression, or, with
        ``mode: one_of``, with one that is none of the choices) is not the workflow's fault: its ``error`` and
        ``reasoning["error"]`` say so and its score is None, which NAT leaves out of the average.
        """
        answer = expected_of(item)
        if answer is None:
            return no_answer(item)
        output, expected = "" if item.output_obj is None else str(item.output_obj), str(answer)
        reasoning: dict[str, Any] = {"output": output, "expected": expected, "mode": self.config.mode}
        if self.config.mode == "one_of":
            reasoning["named"] = sorted(named_choices(output, self.config))
        try:
            matched = matches(output, expected, self.config)
        except re.error as error:
            return failure(item, f"the expected answer {expected!r} is not a regular expression: {error}")
        except LookupError as error:
            return failure(item, str(error))
        return EvalOutputItem(id=item.id, score=float(matched), reasoning=reasoning)


def matches(output: str, expected: str, config: EvsysExactMatchConfig) -> bool:
    """Whether ``output`` matches ``expected`` as ``config`` says; a regular expression itself is not normalised.

    Raises:
        re.error: ``mode: regex`` and ``expected`` is not a regular expression.
        LookupError: ``mode: one_of`` and ``expected`` is not among the choices.
    """
    if config.mode == "one_of":
        wanted = _normalise(expected, config)
        choices = [_normalise(choice, config) for choice in config.choices]
        if wanted not in choices:
            raise LookupError(f"the expected answer {expected!r} is not among the evaluator's choices {config.choices}")
        return named_choices(output, config) == {wanted}
    if config.mode == "regex":
        text = " ".join(output.split()) if config.ignore_whitespace else output
        return re.search(expected, text, re.IGNORECASE if config.ignore_case else 0) is not None
    output, expected = _normalise(output, config), _normalise(expected, config)
    return expected in output if config.mode == "contains" else output == expected


def named_choices(output: str, config: EvsysExactMatchConfig) -> set[str]:
    """The choices, normalised, that ``output`` names as whole words; of two with the same beginning, the longer one."""
    choices = sorted((_normalise(choice, config) for choice in config.choices), key=len, reverse=True)
    either = "|".join(map(re.escape, choices))
    return set(re.findall(rf"(?<!\w)(?:{either})(?!\w)", _normalise(output, config)))


def _normalise(text: str, config: EvsysExactMatchConfig) -> str:
    if config.ignore_whitespace:
        text = " ".join(text.split())
    return text.casefold() if config.ignore_case else text
