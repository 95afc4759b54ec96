"""A dataset row: a question and the functions that may answer it, as one JSON text."""

import json
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool
from pydantic import BaseModel

TOOL_RESULT = "called"


class Row(BaseModel):
    """What the agent is asked; ``functions`` are OpenAI's: name, description and JSON Schema of the parameters."""

    question: str
    functions: list[dict[str, Any]]

    def tools(self) -> list[BaseTool]:
        """Tools that can be called with any arguments and do nothing: what is scored is the call."""
        return [
            StructuredTool(
                name=function["name"],
                description=function["description"],
                args_schema=function["parameters"],
                coroutine=_called,
            )
            for function in self.functions
        ]


async def _called(**arguments: Any) -> str:
    return TOOL_RESULT


def calls_to_json(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """The agent's answer, as ``evsys_function_call`` reads it."""
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
