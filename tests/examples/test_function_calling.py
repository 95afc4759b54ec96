"""Rows made from the leaderboard's questions, and the agent that gets other tools with each row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from nat.runtime.loader import load_workflow
from nat_function_calling.rows import Row
from openai_listener import Listener

from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.evaluators.accepted_calls import why_calls_differ
from nat_plugin_evsys.evaluators.function_call import read_accepted, read_calls
from nat_plugin_evsys.policy.chat import ChatRenderer

CONFIG = Path(__file__).parents[2] / "configs" / "function_calling.yml"


@pytest.fixture(scope="module")
def make_data(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("function_calling/make_data.py")


@pytest.fixture(scope="module")
def parts(make_data: ModuleType) -> dict[str, list[dict[str, Any]]]:
    return make_data.split(make_data.questions(), make_data.SIZES)


def test_every_question_is_in_one_part(parts: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(rows) for name, rows in parts.items()} == {"heldout": 100, "demonstrations": 100, "train": 200}
    assert len({row["id"] for rows in parts.values() for row in rows}) == 400


def test_the_small_parts_are_within_the_full_ones(
    make_data: ModuleType, parts: dict[str, list[dict[str, Any]]]
) -> None:
    for name, rows in make_data.split(make_data.questions(), make_data.SMALL).items():
        assert {row["id"] for row in rows} < {row["id"] for row in parts[name]}


def test_every_demonstration_is_a_call_that_its_row_accepts(
    make_data: ModuleType, parts: dict[str, list[dict[str, Any]]]
) -> None:
    for row in [row for rows in parts.values() for row in rows]:
        shown = make_data.demonstration(row)
        calls = read_calls(shown["messages"][-1]["tool_calls"])
        accepted = read_accepted(make_data.dataset_row(row)["answer"])
        assert why_calls_differ(calls, accepted, ignore_order=True) is None, row["id"]
        assert [tool["function"]["name"] for tool in shown["tools"]] == [calls[0].name]


def test_functions_are_described_in_json_schema(make_data: ModuleType, parts: dict[str, list[dict[str, Any]]]) -> None:
    def types(schema: Any) -> set[str]:
        if isinstance(schema, dict):
            found = {schema["type"]} if isinstance(schema.get("type"), str) else set()
            return found.union(*map(types, schema.values()))
        return set().union(*map(types, schema)) if isinstance(schema, list) else set()

    seen = set()
    for row in parts["train"]:
        asked = Row.model_validate_json(make_data.dataset_row(row)["question"])
        assert asked.question == row["question"][0][0]["content"]
        for function in asked.functions:
            assert "." not in function["name"]
            seen |= types(function["parameters"])
    assert seen <= {"object", "array", "string", "integer", "number", "boolean"}


async def test_a_row_brings_tools_that_take_any_arguments() -> None:
    function = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
    (tool,) = Row(question="1+2?", functions=[function]).tools()
    assert await tool.ainvoke({"a": 1, "b": "x"}) == "called"
    assert json.loads(json.dumps(tool.args_schema)) == function["parameters"]


async def test_the_agent_sends_what_the_demonstrations_show(
    make_data: ModuleType, parts: dict[str, list[dict[str, Any]]], listener: Listener, tmp_path: Path
) -> None:
    row = parts["train"][0]
    asked, shown = make_data.dataset_row(row), make_data.demonstration(row)
    listener.replies = [shown["messages"][-1]]
    workflow = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["workflow"]
    (tmp_path / "agent.yml").write_text(yaml.safe_dump({"llms": {"policy": listener.llm()}, "workflow": workflow}))
    async with load_workflow(str(tmp_path / "agent.yml")) as agent, agent.run(asked["question"]) as runner:
        answer = await runner.result(to_type=str)
    (request,) = listener.requests
    renderer = ChatRenderer(load_tokenizer("builtin/tiny"))
    assert renderer.render(request["messages"], request["tools"]) == renderer.render(
        shown["messages"][:-1], shown["tools"]
    )
    assert why_calls_differ(read_calls(answer), read_accepted(asked["answer"]), ignore_order=True) is None


async def test_an_agent_that_calls_nothing_answers_with_its_text(
    make_data: ModuleType, parts: dict[str, list[dict[str, Any]]], listener: Listener, tmp_path: Path
) -> None:
    asked = make_data.dataset_row(parts["train"][0])
    listener.replies = [{"role": "assistant", "content": "I do not know."}]
    workflow = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["workflow"]
    (tmp_path / "agent.yml").write_text(yaml.safe_dump({"llms": {"policy": listener.llm()}, "workflow": workflow}))
    async with load_workflow(str(tmp_path / "agent.yml")) as agent, agent.run(asked["question"]) as runner:
        assert await runner.result(to_type=str) == "I do not know."
