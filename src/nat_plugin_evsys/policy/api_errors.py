"""Errors in OpenAI's shape, with statuses chosen for what its clients do.

OpenAI's clients retry 408, 409, 429 and 5xx, unless ``x-should-retry: false`` says not to.
"""

from __future__ import annotations

from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import (
    ApiError,
    CheckpointError,
    ConfigError,
    DataError,
    EngineClosedError,
    EvsysError,
    ModelError,
    PromptTooLongError,
    Refusal,
    UnsupportedError,
)

INVALID_REQUEST = "invalid_request_error"
TOO_LONG = "context_length_exceeded"

_REFUSALS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "invalid_request"),
    429: ("rate_limit_error", "invalid_request"),
}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the request itself is wrong, so clients do not retry it."""
    return ApiError(400, message, param=param, code=code)


def shutting_down() -> ApiError:
    """A 503 for requests that arrive or are in flight while the endpoint closes."""
    return ApiError(503, "the policy endpoint is shutting down", type="server_error", code="shutting_down")


def api_error_of(error: Exception) -> ApiError:
    """The answer to a request that ended in ``error``."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refusal):
        kind, code = _REFUSALS.get(error.status, (INVALID_REQUEST, "invalid_request"))
        return ApiError(error.status, str(error), type=kind, code=code)
    if isinstance(error, PromptTooLongError):
        return bad_request(str(error), param="messages", code=TOO_LONG)
    if isinstance(error, DataError):
        return bad_request(str(error), code="invalid_value")
    if isinstance(error, UnsupportedError):
        return bad_request(str(error), code="unsupported_parameter")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), type="server_error", code="engine_closed")
    if isinstance(error, ConfigError | ModelError | CheckpointError):
        return ApiError(500, str(error), type="server_error", code="policy_not_loaded", retry=False)
    if isinstance(error, EvsysError):
        return ApiError(500, str(error), type="server_error", code="engine_error")
    return ApiError(500, f"{type(error).__name__}: {error}", type="server_error", code="internal_error")


def is_infrastructure(error: ApiError) -> bool:
    """True if neither the client nor the policy caused it."""
    return error.status >= 500


def refusal_of(error: ApiError) -> DropReason:
    """What a call is counted under that was answered with this error, which its sender caused."""
    return DropReason.PROMPT_TOO_LONG if error.code == TOO_LONG else DropReason.REQUEST_REFUSED


def body_of(error: ApiError) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def headers_of(error: ApiError) -> dict[str, str]:
    """Its headers."""
    return {} if error.retry else {"x-should-retry": "false"}
