"""What NAT discovers: ``row_tools_agent``, NAT's tool calling agent with other tools for each row."""

from collections.abc import AsyncIterator

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, LLMFrameworkEnum, LLMRef, register_function
from pydantic import ConfigDict, Field


class RowToolsAgentConfig(FunctionBaseConfig, name="row_tools_agent"):
    """NAT's `tool_calling_agent`, except that its tools are not functions of the YAML: each row brings its own.

    The input is JSON, `{"question": …, "functions": […]}`; the answer is the agent's calls, or its text where there
    are none.
    """

    model_config = ConfigDict(extra="forbid")

    llm_name: LLMRef = Field(description="The LLM that chooses the calls.")
    system_prompt: str | None = Field(default=None, description="System prompt of every conversation.")


@register_function(config_type=RowToolsAgentConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def row_tools_agent(config: RowToolsAgentConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    from langchain_core.messages import AIMessage, HumanMessage
    from nat.plugins.langchain.agent.tool_calling_agent.agent import ToolCallAgentGraph, ToolCallAgentGraphState

    from nat_function_calling.rows import Row, calls_to_json

    llm = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def _answer(row: str) -> str:
        asked = Row.model_validate_json(row)
        tools = asked.tools()
        # return_direct ends the conversation after the first calls; there is no result to talk about.
        agent = ToolCallAgentGraph(llm=llm, tools=tools, prompt=config.system_prompt, return_direct=tools)
        graph = await agent.build_graph()
        state = await graph.ainvoke(ToolCallAgentGraphState(messages=[HumanMessage(asked.question)]))
        replies = [message for message in state["messages"] if isinstance(message, AIMessage)]
        calls = [(call["name"], call["args"]) for reply in replies for call in reply.tool_calls]
        return calls_to_json(calls) if calls else str(replies[-1].content)

    yield FunctionInfo.from_fn(_answer, description="Answers a question by calling the functions that come with it.")
