"""A LangGraph program for NAT's ``langgraph_wrapper``: a graph of one's own with a client of one's own."""

from __future__ import annotations

from typing import Any

from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from pydantic import SecretStr

from nat_plugin_evsys import policy_endpoint


def graph(_config: RunnableConfig) -> StateGraph[Any, Any, Any]:
    """Two calls of the policy, one after the other."""
    endpoint = policy_endpoint()
    llm = ChatOpenAI(base_url=endpoint.base_url, api_key=SecretStr(endpoint.api_key), model=endpoint.model)

    async def answer(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke(state["messages"])]}

    async def check(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await llm.ainvoke([*state["messages"], ("user", "Are you sure?")])]}

    made = StateGraph(MessagesState)
    made.add_node("answer", answer)
    made.add_node("check", check)
    made.add_edge(START, "answer")
    made.add_edge("answer", "check")
    made.add_edge("check", END)
    return made
