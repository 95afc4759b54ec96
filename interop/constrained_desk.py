"""A NAT workflow of two constrained tool calls: a desk is chosen, its opening hours are read, the ticket is filed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, LLMFrameworkEnum, LLMRef, register_function

Desk = Literal["network", "printing", "accounts", "payroll"]

SYSTEM = (
    "You are a help desk. Choose the desk that should handle the ticket (network, printing, accounts or payroll), "
    "then file the ticket there."
)


@tool
def choose_desk(desk: Desk) -> str:
    """Ask a desk whether it is open."""
    return f"The {desk} desk is open."


@tool
def file_ticket(desk: Desk, urgent: bool) -> str:
    """File the ticket at a desk."""
    return desk


class ConstrainedDeskConfig(FunctionBaseConfig, name="constrained_desk"):
    """Every reply must be one call of the turn's tool."""

    llm_name: LLMRef


@register_function(config_type=ConstrainedDeskConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def constrained_desk(config: ConstrainedDeskConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    llm: Any = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
    first = llm.bind_tools([choose_desk, file_ticket], tool_choice="choose_desk", strict=True)
    second = llm.bind_tools([choose_desk, file_ticket], tool_choice="required", parallel_tool_calls=False, strict=True)

    async def _file(ticket: str) -> str:
        messages: list[Any] = [SystemMessage(SYSTEM), HumanMessage(ticket)]
        filed = ""
        for model, tools in ((first, [choose_desk]), (second, [choose_desk, file_ticket])):
            reply = await model.ainvoke(messages)
            if len(reply.tool_calls) != 1 or reply.invalid_tool_calls:
                raise ValueError(f"not one call of the form that was asked for: {reply.content!r}")
            (call,) = reply.tool_calls
            chosen = next(each for each in tools if each.name == call["name"])
            result = await chosen.ainvoke(call["args"])  # pydantic checks the arguments
            messages += [reply, ToolMessage(result, tool_call_id=call["id"])]
            filed = call["args"]["desk"]
        return json.dumps(filed).strip('"')

    yield FunctionInfo.from_fn(_file, description="Files a ticket.")
