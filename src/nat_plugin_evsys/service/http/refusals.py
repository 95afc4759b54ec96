"""What the HTTP layer refuses, always with a JSON body that says why."""

from __future__ import annotations

from starlette.responses import JSONResponse

from nat_plugin_evsys.errors import (
    CheckpointError,
    EngineClosedError,
    EvsysError,
    QueueFullError,
    Refusal,
    StoreError,
)


def refusal_of(error: EvsysError) -> Refusal:
    """The answer to a refusal of the store or the engine."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFullError):
        return Refusal(429, str(error), headers={"retry-after": "1"})
    if isinstance(error, EngineClosedError | StoreError):
        return Refusal(503, str(error), headers={"retry-after": "2"})
    if isinstance(error, CheckpointError):
        return Refusal(404, str(error))
    return Refusal(400, str(error))


def response_of(refusal: Refusal) -> JSONResponse:
    """The HTTP response."""
    category = "user" if refusal.status < 500 else "server"
    body = {"error": str(refusal), "category": category}
    return JSONResponse(body, status_code=refusal.status, headers=refusal.headers)


def bad_request(message: str) -> Refusal:
    """400: the request itself is wrong."""
    return Refusal(400, message)


def not_found(what: str) -> Refusal:
    """404, with the same words for things that do not exist and things of another key."""
    return Refusal(404, f"there is no {what} here")


def not_offered(what: str, why: str) -> Refusal:
    """404 for a part of the protocol that this server does not support."""
    return Refusal(404, f"{what} is not offered by this server: {why}")
