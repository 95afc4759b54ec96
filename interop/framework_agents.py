"""One NAT workflow for each agent framework: its own agent, with NAT's client of the policy and one tool."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, LLMFrameworkEnum, LLMRef, register_function

Ask = Callable[[str], Awaitable[str]]


class FrameworkAgentConfig(FunctionBaseConfig):
    """What all of them have."""

    llm_name: LLMRef
    tool_name: str
    system_prompt: str


def llama_index(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from llama_index.core.agent.workflow import FunctionAgent

    agent = FunctionAgent(tools=[tool], llm=llm, system_prompt=system_prompt, timeout=None)

    async def ask(question: str) -> str:
        return str(await agent.run(question, max_iterations=4))

    return ask


def crewai(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from crewai import Agent, Crew, Task

    async def ask(question: str) -> str:
        agent = Agent(role="help desk", goal=system_prompt, backstory="", llm=llm, tools=[tool], max_iter=3)
        task = Task(description=question, expected_output="the desk to go to", agent=agent)
        return str(await Crew(agents=[agent], tasks=[task]).kickoff_async())

    return ask


def agno(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from agno.agent import Agent

    async def ask(question: str) -> str:
        agent = Agent(model=llm, tools=[tool], system_message=system_prompt, tool_call_limit=2, telemetry=False)
        return str((await agent.arun(question)).content)

    return ask


def adk(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from google.adk.agents import Agent, RunConfig
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    agent = Agent(name="help_desk", model=llm, instruction=system_prompt, tools=[tool])
    runner = InMemoryRunner(agent=agent, app_name="help_desk")

    async def ask(question: str) -> str:
        session = await runner.session_service.create_session(app_name="help_desk", user_id="caller")
        message = types.Content(role="user", parts=[types.Part(text=question)])
        said = ""
        async for event in runner.run_async(
            user_id="caller", session_id=session.id, new_message=message, run_config=RunConfig(max_llm_calls=4)
        ):
            if event.content and event.content.parts:
                said = "".join(part.text or "" for part in event.content.parts)
        return said

    return ask


def semantic_kernel(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from semantic_kernel import Kernel
    from semantic_kernel.agents import ChatCompletionAgent
    from semantic_kernel.connectors.ai import FunctionChoiceBehavior

    kernel = Kernel()
    kernel.add_service(llm)
    for name, function in tool.items():
        kernel.add_function(plugin_name="desk", function_name=name, function=function)
    behaviour = FunctionChoiceBehavior.Auto(maximum_auto_invoke_attempts=2)
    agent = ChatCompletionAgent(
        kernel=kernel, name="help_desk", instructions=system_prompt, function_choice_behavior=behaviour
    )

    async def ask(question: str) -> str:
        return str((await agent.get_response(messages=question)).message.content)

    return ask


def strands(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from strands import Agent

    async def ask(question: str) -> str:
        agent = Agent(model=llm, tools=[tool], system_prompt=system_prompt, callback_handler=None)
        return str(await agent.invoke_async(question))

    return ask


def autogen(llm: Any, tool: Any, system_prompt: str) -> Ask:
    from autogen_agentchat.agents import AssistantAgent

    async def ask(question: str) -> str:
        agent = AssistantAgent(
            "help_desk", model_client=llm, tools=[tool], system_message=system_prompt, reflect_on_tool_use=True
        )
        return str((await agent.run(task=question)).messages[-1].to_text())

    return ask


AGENTS = {
    LLMFrameworkEnum.LLAMA_INDEX: llama_index,
    LLMFrameworkEnum.CREWAI: crewai,
    LLMFrameworkEnum.AGNO: agno,
    LLMFrameworkEnum.ADK: adk,
    LLMFrameworkEnum.SEMANTIC_KERNEL: semantic_kernel,
    LLMFrameworkEnum.STRANDS: strands,
    LLMFrameworkEnum.AUTOGEN: autogen,
}


def register_agent(framework: LLMFrameworkEnum) -> None:
    class AgentConfig(FrameworkAgentConfig, name=f"{framework.value}_agent"):
        """An agent of this framework."""

    @register_function(config_type=AgentConfig, framework_wrappers=[framework])
    async def agent(config: AgentConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
        llm = await builder.get_llm(config.llm_name, wrapper_type=framework)
        tool = await builder.get_tool(config.tool_name, wrapper_type=framework)
        ask = AGENTS[framework](llm, tool, config.system_prompt)

        async def answer(question: str) -> str:
            return await ask(question)

        yield FunctionInfo.from_fn(answer, description="Answers a caller.")


for each in AGENTS:
    register_agent(each)
