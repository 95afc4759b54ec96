"""The ASGI application: all routes of the server."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.download_routes import DownloadRoutes
from nat_plugin_evsys.service.http.future_routes import FutureRoutes
from nat_plugin_evsys.service.http.logs import AccessLog
from nat_plugin_evsys.service.http.openai import openai_routes
from nat_plugin_evsys.service.http.operation_routes import OperationRoutes
from nat_plugin_evsys.service.http.operator_routes import OperatorRoutes
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
            *OperatorRoutes(context).routes(),
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
