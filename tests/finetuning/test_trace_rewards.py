"""What an evaluator sees of a record is what was recorded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import pytest
from nat.data_models.config import Config
from nat.data_models.evaluator import EvalInputItem, EvaluatorBaseConfig
from nat.plugin_api import Builder, EvaluatorInfo, register_evaluator
from nat.plugins.eval.data_models.evaluator_io import EvalOutput, EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator
from nat.runtime.loader import PluginTypes, discover_and_register_plugins

from nat_plugin_evsys.config import EvsysExactMatchConfig
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.traces.rewards import evaluator_scores
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.rollouts.traces.otlp import steps_of
from nat_plugin_evsys.rollouts.traces.record import Record


class SeenConfig(EvaluatorBaseConfig, name="seen"):
    """Gives every item 1.0, and says what it is."""

    atif: bool = False


class Seen(BaseEvaluator):
    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        seen = [item.input_obj, item.output_obj, item.expected_output_obj, item.full_dataset_entry]
        return EvalOutputItem(id=item.id, score=1.0, reasoning=seen)


async def seen_in_atif(samples: Any) -> EvalOutput:
    items = [
        EvalOutputItem(id=each.item_id, score=1.0, reasoning=[each.output_obj, each.expected_output_obj])
        for each in samples
    ]
    return EvalOutput(average_score=1.0, eval_output_items=items)


@register_evaluator(config_type=SeenConfig)
async def seen(config: SeenConfig, _builder: Builder) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    info = EvaluatorInfo(config=config, evaluate_fn=Seen().evaluate, description="")
    if config.atif:
        info.evaluate_atif_fn = seen_in_atif
    yield info


async def scores(evaluator: EvaluatorBaseConfig, records: list[Record], rows: dict[Any, Any]) -> list[Any]:
    discover_and_register_plugins(PluginTypes.ALL)
    config = Config()
    config.eval.evaluators = {"reward": evaluator}
    rollouts = Rollouts("traces", "rollout", 0, Recorder(), exporters=RunExporters({}))
    return await evaluator_scores(records, rows, rollouts, config=config, reward_name="reward", evaluator_timeout=60.0)


def record(output: Any, expected: Any, question: Any = "How much?") -> Record:
    return Record("r", question=question, output=output, expected=expected)


async def test_texts_that_look_like_numbers_are_compared_as_texts() -> None:
    records = [record("1e1", "10"), record("007.0", "007"), record("007", "007")]
    found = await scores(EvsysExactMatchConfig(), records, {})
    assert [item.score for item in found] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(("question", "output"), [("12", "34"), (12, None), (None, ["34"]), ("", 34.0)])
async def test_an_evaluator_is_given_what_is_recorded(question: Any, output: Any) -> None:
    row = {"created_at": "20260102", "date": date(2026, 1, 2), "level": "1"}
    (found,) = await scores(SeenConfig(), [record(output, "056", question)], {question: row} if question else {})
    assert found.reasoning[:3] == [question, output, "056"]
    assert {name: found.reasoning[3].get(name) for name in row} == (row if question == "12" else dict.fromkeys(row))


async def test_so_is_one_that_reads_atif() -> None:
    (found,) = await scores(SeenConfig(atif=True), [record("34", "056")], {})
    assert found.reasoning == ["34", "056"]


@pytest.mark.parametrize("others", [0, 1])
async def test_steps_that_nat_cannot_read_leave_their_record_without_a_score(others: int) -> None:
    odd = record("34", "34")
    odd.steps = [{"parent_id": "p", "function_ancestry": {"function_id": "f", "function_name": "f"}, "payload": {}}]
    first, *found = await scores(EvsysExactMatchConfig(), [odd, *[record("34", "34")] * others], {})
    assert (first.score, first.error) == (None, "NAT cannot read its step 0.payload.event_type: Field required")
    assert [item.score for item in found] == [1.0] * others


async def test_an_evaluator_is_given_the_steps_of_spans() -> None:
    said = {"nat.event_type": "LLM_START", "nat.workflow.run_id": "r", "input.value": "q", "output.value": "34"}
    attributes = [{"key": key, "value": {"stringValue": value}} for key, value in said.items()]
    span = {"spanId": "s", "attributes": attributes}
    _, steps = steps_of(span)
    traced = record("34", "34")
    traced.steps = [dict(step) for step in steps]
    assert [item.score for item in await scores(EvsysExactMatchConfig(), [traced], {})] == [1.0]
