"""A call to the help desk: the caller is slow to say what is wrong, and the agent asks until it knows."""

from collections.abc import Sequence
from dataclasses import dataclass

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

ASK = "ask"
"""The reply that lets the caller go on."""

HUNG_UP = "the caller hung up"

BETWEEN_LINES = " / "


@dataclass(slots=True)
class Call:
    """A caller with some lines to say: one at the beginning, and one more each time the agent asks.

    Attributes:
        lines: what the caller says, in order. The last one is the ticket.
        said: how many lines were said.
        result: the team that the agent named, or that the caller hung up; None while the call goes on.
    """

    lines: Sequence[str]
    said: int = 1
    result: str | None = None

    @property
    def told(self) -> str:
        """The caller's latest line."""
        return self.lines[self.said - 1]

    def reply(self, text: str) -> None:
        """The agent asks, or ends the call with a team. A caller who has said everything and is asked hangs up."""
        if text.strip() != ASK:
            self.result = text.strip()
        elif self.said == len(self.lines):
            self.result = HUNG_UP
        else:
            self.said += 1


async def interview(llm: BaseChatModel, row: str, system_prompt: str) -> str:
    """Hold the call of a ``row``, the caller's lines with ``BETWEEN_LINES`` between them; how it ended."""
    call, messages = Call(row.split(BETWEEN_LINES)), list[BaseMessage]([SystemMessage(system_prompt)])
    while call.result is None:
        messages.append(HumanMessage(call.told))
        reply = await llm.ainvoke(messages)
        messages.append(AIMessage(reply.content))
        call.reply(str(reply.content))
    return call.result
