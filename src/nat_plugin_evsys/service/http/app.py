"""The ASGI application: all routes of the server."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from nat_plugin_evsys.service.http.context import API, ServiceContext
from nat_plugin_evsys.service.http.download_routes import DownloadRoutes
from nat_plugin_evsys.service.http.future_routes import FutureRoutes
from nat_plugin_evsys.service.http.logs import AccessLog
from nat_plugin_evsys.service.http.openai import openai_routes
from nat_plugin_evsys.service.http.operation_routes import OperationRoutes
from nat_plugin_evsys.service.http.prometheus import CONTENT_TYPE
from nat_plugin_evsys.service.http.run_routes import RunRoutes
from nat_plugin_evsys.service.http.sampler_routes import SamplerRoutes
from nat_plugin_evsys.service.http.session_routes import SessionRoutes
from nat_plugin_evsys.service.http.status import server_status
from nat_plugin_evsys.service.http.unoffered_routes import unknown_route, unoffered_routes


def create_app(context: ServiceContext) -> ASGIApp:
    """The application of a running server."""
    context.metrics.watch(lambda: server_status(context, None))
    app = Starlette(
        routes=[
            *_operator_routes(context),
            *unoffered_routes(context),
            *SessionRoutes(context).routes(),
            *OperationRoutes(context).routes(),
            *FutureRoutes(context).routes(),
            *SamplerRoutes(context).routes(),
            *RunRoutes(context).routes(),
            *DownloadRoutes(context).routes(),
            *openai_routes(context),
        ],
        exception_handlers={HTTPException: unknown_route},
    )
    app.router.redirect_slashes = False
    return AccessLog(app, context.metrics)


def _operator_routes(context: ServiceContext) -> list[Route]:
    async def healthz(request: Request, owner: str) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request, owner: str) -> Response:
        return Response(await asyncio.to_thread(context.metrics.exposition), media_type=CONTENT_TYPE)

    async def status(request: Request, owner: str) -> Response:
        return JSONResponse(await asyncio.to_thread(server_status, context, owner))

    return [
        context.route("GET", "/healthz", healthz, public=True),
        context.route("GET", f"{API}/healthz", healthz, public=True),
        context.route("GET", "/metrics", metrics),
        context.route("GET", "/status", status),
    ]
