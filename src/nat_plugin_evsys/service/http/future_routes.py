"""Futures, the answers to operations: polling and cancelling them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.service.http.bounds import parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext, accepted
from nat_plugin_evsys.service.http.refusals import not_found
from nat_plugin_evsys.web.json_bodies import read_json


class _Future(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    request_id: str = Field(max_length=200)


class FutureRoutes:
    """``retrieve_future`` and ``cancel_future``."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("POST", f"{API}/retrieve_future", self._retrieve),
            route("POST", f"{API}/cancel_future", self._cancel),
        ]

    async def _retrieve(self, request: Request, owner: str) -> Response:
        """The outcome, once it is there; 408 makes the SDK ask again at once, silently."""
        _, value = await read_json(request)
        request_id = parse_as(_Future, value).request_id
        stored = await self._context.pending.outcome(request_id, owner)
        if stored is None or stored.outcome is None:
            return JSONResponse(
                {"type": "try_again", "request_id": request_id, "queue_state": "active"}, status_code=408
            )
        return Response(stored.outcome.body, media_type=stored.outcome.content_type)

    async def _cancel(self, request: Request, owner: str) -> Response:
        """Best effort: sampling stops; training continues."""
        _, value = await read_json(request)
        request_id = parse_as(_Future, value).request_id
        stored = await self._context.read(self._context.store.outcome, request_id)
        if stored is None or stored.owner != owner:
            raise not_found(f"request {request_id!r}")
        self._context.engine.cancel(request_id)
        return accepted(request_id=request_id)
