"""What NAT discovers: the ``helpdesk_route_ticket`` tool."""

from collections.abc import AsyncIterator
from typing import Literal, cast

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, register_function
from pydantic import BaseModel, ConfigDict, Field

Team = Literal["network", "printing", "accounts", "payroll"]

DESKS: dict[Team, int] = {"network": 12, "printing": 27, "accounts": 34, "payroll": 48}

DESCRIPTION = "Route the ticket to a team. Returns its desk."


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
