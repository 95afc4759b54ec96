"""Unsupported parts of the protocol, each with its reason, and all unknown paths."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nat_plugin_evsys.errors import ApiError, Refusal
from nat_plugin_evsys.policy.chat_routes import error_response
from nat_plugin_evsys.service.http.context import API, Handler, ServiceContext
from nat_plugin_evsys.service.http.openai import PREFIXES
from nat_plugin_evsys.service.http.refusals import not_offered, response_of

_ACCOUNTS = "there are no accounts and projects here; each API key stands for itself"
_BILLING = "nothing is billed"

_UNOFFERED = {
    "auth/token": ("the exchange of tokens", "every request carries the API key itself"),
    "create_custom_loss": (
        "a custom loss on the server",
        "forward_backward_custom runs it in the client, with the same result",
    ),
    "retrieve_futures": ("polling many futures at once", "poll each with retrieve_future"),
    "copy_weights": ("copying weights between accounts", _ACCOUNTS),
    "unload_model": ("unloading by hand", "finish the session, which frees its models"),
    "sessions/search": ("searching sessions", "list them with GET /api/v1/sessions"),
    "sessions/{session_id}/project": ("assigning a project", _ACCOUNTS),
    "sessions/{session_id}/trace_export": ("exporting traces", "none are recorded"),
    "audit": ("an audit log", _ACCOUNTS),
    "billing/usage/events": ("billing", _BILLING),
    "billing/usage/checkpoints/current": ("billing", _BILLING),
}
_METHODS = ("GET", "POST", "PUT")


def unoffered_routes(context: ServiceContext) -> list[Route]:
    """Routes that answer 404 and say what is not offered, and why."""
    return [
        context.route(method, f"{API}/{path}", _refuses(what, why))
        for path, (what, why) in _UNOFFERED.items()
        for method in _METHODS
    ]


def _refuses(what: str, why: str) -> Handler:
    async def handler(request: Request, owner: str) -> Response:
        raise not_offered(what, why)

    return handler


async def unknown_route(request: Request, error: Exception) -> Response:
    """Starlette's 404 and 405, with a body."""
    assert isinstance(error, HTTPException)
    # Not request.url: a Host header that is no host has none.
    path = request.scope["path"]
    message = (
        f"{request.method} {path[:200]} is not served here; the protocol is under {API}/, chat completions under /v1/"
    )
    if path.startswith(tuple(f"{prefix}/" for prefix in PREFIXES)):
        return error_response(ApiError(error.status_code, message, code="unknown_url"))
    return response_of(Refusal(error.status_code, message, headers=dict(error.headers or {})))
