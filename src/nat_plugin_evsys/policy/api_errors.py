"""Errors in OpenAI's shape, with statuses chosen for what its clients do.

OpenAI's clients retry 408, 409, 429 and 5xx, unless ``x-should-retry: false`` says that it is of no use.
"""

from __future__ import annotations

from typing import Any

from nat_plugin_evsys.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineClosedError,
    EvsysError,
    ModelError,
    PromptTooLongError,
    Refusal,
)

INVALID_REQUEST = "invalid_request_error"

_REFUSALS = {
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "invalid_request"),
    429: ("rate_limit_error", "invalid_request"),
}


class ApiError(Exception):
    """An error response.

    Attributes:
        status: HTTP status.
        type, param, code: as in OpenAI's error object.
        retry: False tells the client not to try again where its status says otherwise.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry = retry

    @classmethod
    def bad_request(cls, message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
        """A 400: the request itself is wrong, so it is not tried again."""
        return cls(400, message, param=param, code=code)

    @classmethod
    def shutting_down(cls) -> ApiError:
        """A 503 for requests that come, or are in flight, while the endpoint closes."""
        return cls(503, "the policy endpoint is shutting down", type="server_error", code="shutting_down")

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """The response to an exception that a request ended in."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, Refusal):
            kind, code = _REFUSALS.get(error.status, (INVALID_REQUEST, "invalid_request"))
            return cls(error.status, str(error), type=kind, code=code)
        if isinstance(error, PromptTooLongError):
            return cls.bad_request(str(error), param="messages", code="context_length_exceeded")
        if isinstance(error, DataError):
            return cls.bad_request(str(error), code="invalid_value")
        if isinstance(error, EngineClosedError):
            return cls(503, str(error), type="server_error", code="engine_closed")
        if isinstance(error, ConfigError | ModelError | CheckpointError):
            return cls(500, str(error), type="server_error", code="policy_not_loaded", retry=False)
        if isinstance(error, EvsysError):
            return cls(500, str(error), type="server_error", code="engine_error")
        return cls(500, f"{type(error).__name__}: {error}", type="server_error", code="internal_error")

    @property
    def is_infrastructure(self) -> bool:
        """True when it says nothing about what the client or the policy did."""
        return self.status >= 500

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        return {} if self.retry else {"x-should-retry": "false"}
