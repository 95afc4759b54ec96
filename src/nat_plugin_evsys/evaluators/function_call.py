"""``evsys_function_call``: did the agent call the right functions with accepted arguments?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator

from nat_plugin_evsys.config.evaluator import EvsysFunctionCallConfig
from nat_plugin_evsys.evaluators.accepted_calls import AcceptedCall, Call, why_calls_differ
from nat_plugin_evsys.evaluators.rows import expected_of, failure, no_answer


class FunctionCallEvaluator(BaseEvaluator):
    """Compares the workflow's function calls with those that the row accepts."""

    def __init__(self, config: EvsysFunctionCallConfig) -> None:
        super().__init__(tqdm_desc="Function calls")
        self.config = config

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        """Score one row: 1.0 if every call is accepted and none is missing, else 0.0; ``reasoning`` says why.

        A row whose expected answer is missing or malformed is not the workflow's fault: its ``error`` says so
        and its score is None, which NAT leaves out of the average.
        """
        expected = expected_of(item)
        if expected is None:
            return no_answer(item)
        try:
            accepted = read_accepted(expected)
        except ValueError as error:
            return failure(item, f"the expected answer {expected!r} {error}")
        output = "" if item.output_obj is None else item.output_obj
        reasoning = {"output": output, "accepted": [call.to_json() for call in accepted]}
        try:
            why = why_calls_differ(read_calls(output), accepted, ignore_order=self.config.ignore_order)
        except ValueError as error:
            why = f"the output {error}"
        return EvalOutputItem(id=item.id, score=float(why is None), reasoning={**reasoning, "why": why or "accepted"})


def read_calls(output: Any) -> list[Call]:
    """The calls in a workflow's output; arguments may be an object or, as OpenAI has them, JSON text.

    Raises:
        ValueError: it is something else; the text says what, to follow "the output".
    """
    calls = _json(output)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise ValueError("is not a list of function calls")
    return [_call(call) for call in calls]


def read_accepted(expected: Any) -> list[AcceptedCall]:
    """The calls of an expected answer, ``[{name: {argument: [accepted values]}}]``.

    Raises:
        ValueError: it is something else.
    """
    rows = _json(expected)
    if not isinstance(rows, list):
        raise ValueError("is not a list of {name: {argument: [accepted values]}}")
    accepted = []
    for row in rows:
        if not (isinstance(row, Mapping) and len(row) == 1 and _are_values(next(iter(row.values())))):
            raise ValueError(f"has {row!r}, which is not {{name: {{argument: [accepted values]}}}}")
        ((name, arguments),) = row.items()
        accepted.append(AcceptedCall(name, arguments))
    return accepted


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError("is not JSON") from error


def _call(call: Any) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), _json(function.get("arguments", {}))
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"has {call!r}, which is not a function call")
    return Call(name, arguments)


def _are_values(arguments: Any) -> bool:
    return isinstance(arguments, Mapping) and all(isinstance(values, list) for values in arguments.values())
