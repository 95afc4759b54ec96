"""Routes of whoever runs the server: whether it lives, what it does, how many replicas it has."""

from __future__ import annotations

import asyncio

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.service.http.bounds import parse_as
from nat_plugin_evsys.service.http.context import API, ServiceContext
from nat_plugin_evsys.service.http.prometheus import CONTENT_TYPE
from nat_plugin_evsys.service.http.status import server_status
from nat_plugin_evsys.web.json_bodies import read_json


class _Scale(BaseModel):
    replicas: int = Field(ge=1)
    base_model: str | None = None


class OperatorRoutes:
    """Health, metrics, status, replicas."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    def routes(self) -> list[Route]:
        """Starlette's routes."""
        route = self._context.route
        return [
            route("GET", "/healthz", self._healthz, public=True),
            route("GET", f"{API}/healthz", self._healthz, public=True),
            route("GET", "/metrics", self._metrics),
            route("GET", "/status", self._status),
            route("POST", "/replicas", self._scale),
        ]

    async def _healthz(self, request: Request, owner: str) -> Response:
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request, owner: str) -> Response:
        return Response(await asyncio.to_thread(self._context.metrics.exposition), media_type=CONTENT_TYPE)

    async def _status(self, request: Request, owner: str) -> Response:
        return JSONResponse(await asyncio.to_thread(server_status, self._context, owner))

    async def _scale(self, request: Request, owner: str) -> Response:
        """``{"replicas": N, "base_model": …}``; without a model, of every one. Answers with the status, when done."""
        self._context.keys.check_operator(owner)
        _, body = await read_json(request)
        asked = parse_as(_Scale, body)
        await asyncio.to_thread(self._context.engine.scale, asked.replicas, asked.base_model)
        return await self._status(request, owner)
