"""What NAT discovers: a tool, the workflows ``helpdesk_interview`` and ``helpdesk_checked``, and an evaluator."""

from collections.abc import AsyncIterator
from typing import Literal, cast

from nat.builder.builder import EvalBuilder
from nat.data_models.evaluator import EvaluatorBaseConfig
from nat.plugin_api import (
    Builder,
    EvaluatorInfo,
    FunctionBaseConfig,
    FunctionInfo,
    LLMFrameworkEnum,
    LLMRef,
    register_evaluator,
    register_function,
)
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


class CheckedConfig(FunctionBaseConfig, name="helpdesk_checked"):
    """One LLM names the team of a ticket, another says whether that is right. The answer is ``network, yes``."""

    model_config = ConfigDict(extra="forbid")

    proposer: LLMRef = Field(description="The LLM that names the team.")
    checker: LLMRef = Field(description="The LLM that says yes or no.")


@register_function(config_type=CheckedConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def helpdesk_checked(config: CheckedConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    from nat_helpdesk.checked import checked

    proposer = await builder.get_llm(config.proposer, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
    checker = await builder.get_llm(config.checker, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def _checked(ticket: str) -> str:
        return await checked(proposer, checker, ticket)

    yield FunctionInfo.from_fn(_checked, description="Names the team of a ticket, and checks it.")


class VerdictConfig(EvaluatorBaseConfig, name="helpdesk_verdict"):
    """Scores a checker that is right about the proposed team: 1 for a yes, a third for a no."""

    model_config = ConfigDict(extra="forbid")


@register_evaluator(config_type=VerdictConfig)
async def helpdesk_verdict(config: VerdictConfig, builder: EvalBuilder) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    from nat_helpdesk.checked import VerdictEvaluator

    yield EvaluatorInfo(config=config, evaluate_fn=VerdictEvaluator().evaluate, description="The checker is right")
