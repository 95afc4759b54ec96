"""What NAT discovers: the ``helpdesk_route_ticket`` tool and the ``helpdesk_interview`` workflow."""

from collections.abc import AsyncIterator
from typing import Literal, cast

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, LLMFrameworkEnum, LLMRef, register_function
from pydantic import BaseModel, ConfigDict, Field

Team = Literal["network", "printing", "accounts", "payroll"]

DESKS: dict[Team, int] = {"network": 12, "printing": 27, "accounts": 34, "payroll": 48}

DESCRIPTION = "Route the ticket to a team. Returns its desk."

INTERVIEW_PROMPT = (
    "You answer the phone of a help desk. Reply with exactly one word in lower case: the team that should help the "
    "caller, which is network, printing, accounts or payroll, or ask if you do not know yet."
)


class RouteTicketConfig(FunctionBaseConfig, name="helpdesk_route_ticket"):
    """Routes a ticket to one of the four teams of the help desk and tells at which desk the team sits."""

    model_config = ConfigDict(extra="forbid")

    desks: dict[Team, int] = Field(default=DESKS, description="Desk number of each team.")


class RouteTicketInput(BaseModel):
    """The tool's arguments, as the model sees them."""

    team: Team


@register_function(config_type=RouteTicketConfig)
async def route_ticket(config: RouteTicketConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the tool as NAT knows it."""

    # NAT checks an argument's type with isinstance, which a Literal does not allow; the input schema has checked it.
    async def _route_ticket(team: str) -> str:
        return f"desk {config.desks[cast(Team, team)]}"

    yield FunctionInfo.from_fn(_route_ticket, input_schema=RouteTicketInput, description=DESCRIPTION)


class InterviewConfig(FunctionBaseConfig, name="helpdesk_interview"):
    """Talks to a caller until it names a team. The input is what the caller has to say; the answer is that team."""

    model_config = ConfigDict(extra="forbid")

    llm_name: LLMRef = Field(description="The LLM that answers the phone.")
    system_prompt: str = Field(default=INTERVIEW_PROMPT, description="System prompt of every call.")


@register_function(config_type=InterviewConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def helpdesk_interview(config: InterviewConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    from nat_helpdesk.interview import interview

    llm = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def _interview(row: str) -> str:
        return await interview(llm, row, config.system_prompt)

    yield FunctionInfo.from_fn(_interview, description="Talks to a caller of the help desk and names a team.")
