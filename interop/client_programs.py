"""What each client is asked, run in its own environment: ``client_programs.py NAME BASE_URL KEY MODEL``.

Prints JSON: ``chat`` and ``stream`` (texts), ``tool`` (the answer after a call of ``add``), ``structured`` (a person).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

HELLO, SUM, PERSON = "Say hello.", "What is the sum of 2 and 3?", "Which person is Ada, 36 years old?"

Answers = dict[str, Any]


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b


ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


def openai(url: str, key: str, model: str) -> Answers:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    hello: Any = [{"role": "user", "content": HELLO}]
    question: Any = [{"role": "user", "content": SUM}]
    chat = client.chat.completions.create(model=model, messages=hello).choices[0].message.content
    with client.chat.completions.stream(model=model, messages=hello) as events:
        stream = "".join(event.delta for event in events if event.type == "content.delta")
    tools: Any = [{"type": "function", "function": {**ADD, "strict": True}}]
    reply = client.chat.completions.create(
        model=model, messages=question, tools=tools, tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    (call,) = reply.message.tool_calls or ()
    result = add(**json.loads(call.function.arguments))
    answer = {"role": "tool", "tool_call_id": call.id, "content": str(result)}
    turns = [*question, reply.message.model_dump(), answer]
    tool = client.chat.completions.create(model=model, messages=turns, tools=tools).choices[0].message.content
    person: Any = [{"role": "user", "content": PERSON}]
    parsed = client.chat.completions.parse(model=model, messages=person, response_format=Person).choices[0].message
    return {"chat": chat, "stream": stream, "tool": tool, "structured": parsed.parsed.model_dump()}


def langchain(url: str, key: str, model: str) -> Answers:
    from langchain.agents import create_agent
    from langchain_openai import ChatOpenAI

    llm = ChatOpenAI(base_url=url, api_key=key, model=model, max_retries=0)
    agent = create_agent(llm, [add])
    return {
        "chat": llm.invoke(HELLO).text,
        "stream": "".join(chunk.text for chunk in llm.stream(HELLO)),
        "tool": agent.invoke({"messages": [{"role": "user", "content": SUM}]})["messages"][-1].text,
        "structured": llm.with_structured_output(Person).invoke(PERSON).model_dump(),
    }


def openai_agents(url: str, key: str, model: str) -> Answers:
    from agents import Agent, Runner, function_tool, set_default_openai_client, set_tracing_disabled
    from openai import AsyncOpenAI
    from openai.types.responses import ResponseTextDeltaEvent

    async def run() -> Answers:
        set_default_openai_client(AsyncOpenAI(base_url=url, api_key=key, max_retries=0), use_for_tracing=False)
        set_tracing_disabled(True)
        plain = Agent(name="plain", model=model)
        streamed = Runner.run_streamed(plain, HELLO)
        deltas = [
            event.data.delta
            async for event in streamed.stream_events()
            if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
        ]
        person = await Runner.run(Agent(name="person", model=model, output_type=Person), PERSON)
        return {
            "chat": (await Runner.run(plain, HELLO)).final_output,
            "stream": "".join(deltas),
            "tool": (await Runner.run(Agent(name="sum", model=model, tools=[function_tool(add)]), SUM)).final_output,
            "structured": person.final_output.model_dump(),
        }

    return asyncio.run(run())


def pydantic_ai(url: str, key: str, model: str) -> Answers:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    async def run() -> Answers:
        llm = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key=key))
        plain = Agent(llm)
        async with plain.run_stream(HELLO) as result:
            deltas = [delta async for delta in result.stream_text(delta=True)]
        return {
            "chat": (await plain.run(HELLO)).output,
            "stream": "".join(deltas),
            "tool": (await Agent(llm, tools=[add]).run(SUM)).output,
            "structured": (await Agent(llm, output_type=Person).run(PERSON)).output.model_dump(),
        }

    return asyncio.run(run())


def litellm(url: str, key: str, model: str) -> Answers:
    from litellm import completion

    def ask(messages: Any, **options: Any) -> Any:
        return completion(
            model=f"openai/{model}", base_url=url, api_key=key, messages=messages, num_retries=0, **options
        )

    hello, question = [{"role": "user", "content": HELLO}], [{"role": "user", "content": SUM}]
    tools = [{"type": "function", "function": ADD}]
    reply = ask(question, tools=tools).choices[0].message
    (call,) = reply.tool_calls
    answer = {"role": "tool", "tool_call_id": call.id, "content": str(add(**json.loads(call.function.arguments)))}
    person = ask([{"role": "user", "content": PERSON}], response_format=Person)
    return {
        "chat": ask(hello).choices[0].message.content,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in ask(hello, stream=True)),
        "tool": ask([*question, reply.model_dump(), answer], tools=tools).choices[0].message.content,
        "structured": json.loads(person.choices[0].message.content),
    }


def instructor(url: str, key: str, model: str) -> Answers:
    import instructor as library
    from openai import OpenAI

    messages: Any = [{"role": "user", "content": PERSON}]
    found = []
    for mode in (library.Mode.TOOLS, library.Mode.JSON):
        client = library.from_openai(OpenAI(base_url=url, api_key=key, max_retries=0), mode=mode)
        options: Any = {"model": model, "messages": messages, "response_model": Person, "max_retries": 0}
        found.append(client.chat.completions.create(**options).model_dump())
        found.append([*client.chat.completions.create_partial(**options)][-1].model_dump())
    assert found == found[:1] * 4, found
    return {"structured": found[0]}


def smolagents(url: str, key: str, model: str) -> Answers:
    from smolagents import ChatMessage, MessageRole, OpenAIModel, ToolCallingAgent, tool

    llm = OpenAIModel(model, api_base=url, api_key=key)

    def message(text: str) -> Any:
        return [ChatMessage(MessageRole.USER, [{"type": "text", "text": text}])]

    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema()}}
    agent = ToolCallingAgent(tools=[tool(add)], model=llm, max_steps=3, verbosity_level=0)
    return {
        "chat": llm.generate(message(HELLO)).content,
        "stream": "".join(delta.content or "" for delta in llm.generate_stream(message(HELLO))),
        "tool": agent.run(SUM),
        "structured": json.loads(llm.generate(message(PERSON), response_format=form).content),
    }


def llama_index(url: str, key: str, model: str) -> Answers:
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model=model, api_base=url, api_key=key, is_chat_model=True, is_function_calling_model=True, max_retries=0
    )

    async def run() -> Answers:
        agent = FunctionAgent(tools=[add], llm=llm)
        stream = await llm.astream_complete(HELLO)
        return {
            "chat": str(await llm.acomplete(HELLO)),
            "stream": "".join([part.delta or "" async for part in stream]),
            "tool": str(await agent.run(SUM)),
            "structured": llm.as_structured_llm(Person).complete(PERSON).raw.model_dump(),
        }

    return asyncio.run(run())


def strands(url: str, key: str, model: str) -> Answers:
    from strands import Agent, tool
    from strands.models.openai import OpenAIModel

    llm = OpenAIModel(client_args={"base_url": url, "api_key": key, "max_retries": 0}, model_id=model)

    async def streamed() -> str:
        agent = Agent(model=llm, callback_handler=None)
        return "".join([event["data"] async for event in agent.stream_async(HELLO) if "data" in event])

    return {
        "chat": str(Agent(model=llm, callback_handler=None)(HELLO)).strip(),
        "stream": asyncio.run(streamed()),
        "tool": str(Agent(model=llm, tools=[tool(add)], callback_handler=None)(SUM)).strip(),
        "structured": Agent(model=llm, callback_handler=None)(
            PERSON, structured_output_model=Person
        ).structured_output.model_dump(),
    }


def adk(url: str, key: str, model: str) -> Answers:
    from google.adk.agents import LlmAgent
    from google.adk.agents.run_config import RunConfig, StreamingMode
    from google.adk.models.lite_llm import LiteLlm
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    llm = LiteLlm(model=f"openai/{model}", api_base=url, api_key=key, num_retries=0)

    async def ask(text: str, streaming: bool = False, **options: Any) -> str:
        runner = InMemoryRunner(agent=LlmAgent(name="agent", model=llm, **options), app_name="app")
        session = await runner.session_service.create_session(app_name="app", user_id="u")
        mode = StreamingMode.SSE if streaming else StreamingMode.NONE
        texts = []
        async for event in runner.run_async(
            user_id="u",
            session_id=session.id,
            new_message=types.Content(role="user", parts=[types.Part(text=text)]),
            run_config=RunConfig(streaming_mode=mode),
        ):
            if event.content and bool(event.partial) == streaming:
                texts += [part.text or "" for part in event.content.parts or ()]
        return "".join(texts)

    async def run() -> Answers:
        return {
            "chat": await ask(HELLO),
            "stream": await ask(HELLO, streaming=True),
            "tool": await ask(SUM, tools=[add]),
            "structured": json.loads(await ask(PERSON, output_schema=Person)),
        }

    return asyncio.run(run())


def dspy(url: str, key: str, model: str) -> Answers:
    import dspy as library

    llm = library.LM(f"openai/{model}", api_base=url, api_key=key, cache=False, num_retries=0)
    question: Any = [{"role": "user", "content": SUM}]
    tools = [{"type": "function", "function": ADD}]
    (reply,) = llm(messages=question, tools=tools)
    (call,) = reply["tool_calls"]
    function = {"name": call.function.name, "arguments": call.function.arguments}
    said = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": call.id, "type": "function", "function": function}],
    }
    result = {"role": "tool", "tool_call_id": call.id, "content": str(add(**json.loads(call.function.arguments)))}
    with library.context(lm=llm, adapter=library.JSONAdapter()):
        person = library.Predict("question -> person: dict[str, str | int]")(question=PERSON)
    tool = llm(messages=[*question, said, result], tools=tools)[0]
    return {
        "chat": llm(HELLO)[0],
        "tool": tool if isinstance(tool, str) else tool["text"],
        "structured": person.person,
    }


def crewai(url: str, key: str, model: str) -> Answers:
    from crewai import LLM, Agent
    from crewai.tools import tool

    llm = LLM(model=f"openai/{model}", base_url=url, api_key=key)
    streaming = LLM(model=f"openai/{model}", base_url=url, api_key=key, stream=True)
    agent = Agent(role="r", goal="g", backstory="b", llm=llm, tools=[tool("add")(add)], max_iter=3)
    person = llm.call([{"role": "user", "content": PERSON}], response_model=Person)
    return {
        "chat": llm.call(HELLO),
        "stream": streaming.call(HELLO),
        "tool": agent.kickoff(SUM).raw,
        "structured": json.loads(person) if isinstance(person, str) else person.model_dump(),
    }


PROGRAMS: dict[str, Callable[[str, str, str], Answers]] = {
    program.__name__: program
    for program in (
        *(openai, langchain, openai_agents, pydantic_ai, litellm, instructor),
        *(smolagents, llama_index, strands, adk, dspy, crewai),
    )
}

if __name__ == "__main__":
    print("ANSWERS " + json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
