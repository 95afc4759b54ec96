"""LangChain's ChatOpenAI against the endpoint, inside and outside NAT runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from nat.builder.context import ContextState

from nat_plugin_evsys.calls import RUN_ID_HEADER, STEP_ID_HEADER
from nat_plugin_evsys.policy.client import attribution_headers, langchain_chat_model, open_langchain_client

MODEL = "builtin/tiny"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


@tool
def add(a: float, b: float) -> float:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize("disable_streaming", [False, True])
async def test_an_agents_two_turns(serve: Any, disable_streaming: bool) -> None:
    served = serve([f"Let me add.\n{CALL}", "The sum is 5."])
    served.recorder.open_run("run", "rollout", 1)
    token = ContextState.get().workflow_run_id.set("run")
    try:
        async with open_langchain_client(
            served.endpoint, model=MODEL, timeout=20, disable_streaming=disable_streaming
        ) as model:
            bound = model.bind_tools([add])
            messages: list[Any] = [HumanMessage("What is 2 + 3?")]
            chunks = [chunk async for chunk in bound.astream(messages)]
            reply = sum(chunks[1:], chunks[0])
            assert reply.content == "Let me add."
            assert [(call["name"], call["args"]) for call in reply.tool_calls] == [("add", {"a": 2, "b": 3})]
            assert reply.usage_metadata["output_tokens"] > 0
            assert (len(chunks) > 3) != disable_streaming
            messages += [reply, ToolMessage("5", tool_call_id=reply.tool_calls[0]["id"])]
            answer = await bound.ainvoke(messages)
    finally:
        ContextState.get().workflow_run_id.reset(token)
    assert answer.content == "The sum is 5."
    assert answer.response_metadata["finish_reason"] == "stop"
    first, second = served.recorder.close_run("run")
    # What the policy sampled is in the next prompt, id for id.
    assert second.prompt_ids[: len(first.prompt_ids) + len(first.output_ids)] == first.prompt_ids + first.output_ids
    assert answer.response_metadata["id"] == second.call_id


async def test_react_style_stop_strings(serve: Any) -> None:
    served = serve(["Thought: I add.\nAction: add\nObservation: 5"])
    async with open_langchain_client(served.endpoint, model=MODEL, timeout=20, disable_streaming=False) as model:
        chunks = [chunk async for chunk in model.bind(stop=["Observation:"]).astream("2 + 3?")]
    assert "".join(chunk.content for chunk in chunks) == "Thought: I add.\nAction: add\n"


def test_synchronous_calls(serve: Any) -> None:
    served = serve(["one", "two"])
    model = langchain_chat_model(
        base_url=served.endpoint.base_url, api_key=served.endpoint.api_key, model=MODEL, timeout=20
    )
    assert model.invoke("hi").content == "one"
    assert "".join(chunk.content for chunk in model.stream("hi")) == "two"
    # Nothing is sent that was not asked for, so the policy's own settings hold.
    assert [request.params.temperature for request in served.sampling.requests] == [0.0, 0.0]
    assert [request.params.max_tokens for request in served.sampling.requests] == [64, 64]


async def test_a_proxy_of_the_environment_is_not_used(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    served = serve(["one"])
    async with open_langchain_client(served.endpoint, model=MODEL, timeout=20, disable_streaming=True) as model:
        assert (await model.ainvoke("hi")).content == "one"


async def test_calls_carry_run_and_step_of_their_own_task(serve: Any) -> None:
    served = serve(lambda prompt: "x")
    for n in range(6):
        served.recorder.open_run(f"run {n}", "rollout", None)
    async with open_langchain_client(served.endpoint, model=MODEL, timeout=20, disable_streaming=True) as model:

        async def rollout(n: int) -> None:
            state = ContextState.get()
            state.workflow_run_id.set(f"run {n}")
            state.active_span_id_stack.set(["root", f"step {n}"])
            await model.ainvoke("hi")

        await asyncio.gather(*(asyncio.create_task(rollout(n)) for n in range(6)))
    for n in range(6):
        (call,) = served.recorder.close_run(f"run {n}")
        assert call.step_id == f"step {n}"


async def test_the_step_is_the_llm_start_step(serve: Any) -> None:
    """With NAT's own LangChain callback, the step id is the UUID of the LLM_START event."""
    from nat.builder.context import Context
    from nat.data_models.intermediate_step import IntermediateStepType
    from nat.plugins.langchain.callback_handler import LangchainProfilerHandler

    served = serve(["x", "y"])
    served.recorder.open_run("run", "rollout", None)
    starts: list[str] = []

    def seen(step: Any) -> None:
        if step.event_type == IntermediateStepType.LLM_START:
            starts.append(step.UUID)

    ContextState.get().workflow_run_id.set("run")
    subscription = Context.get().intermediate_step_manager.subscribe(seen)
    async with open_langchain_client(served.endpoint, model=MODEL, timeout=20, disable_streaming=False) as model:
        config: Any = {"callbacks": [LangchainProfilerHandler()]}
        await model.ainvoke("hi", config=config)
        _ = [chunk async for chunk in model.astream("hi", config=config)]
    subscription.unsubscribe()
    assert len(starts) == 2
    assert [call.step_id for call in served.recorder.close_run("run")] == starts


def test_headers_outside_nat() -> None:
    assert attribution_headers() == {}


def test_headers_inside_nat() -> None:
    import contextvars

    def inside() -> dict[str, str]:
        ContextState.get().workflow_run_id.set("run")
        ContextState.get().active_span_id_stack.set(["root", "a", "b"])
        return attribution_headers()

    assert contextvars.copy_context().run(inside) == {RUN_ID_HEADER: "run", STEP_ID_HEADER: "b"}
