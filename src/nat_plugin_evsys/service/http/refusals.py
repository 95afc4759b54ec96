"""What the HTTP layer refuses, and how it says so: always a JSON body, never an empty one."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from nat_plugin_evsys.errors import CheckpointError, EngineClosedError, EvsysError, QueueFullError, StoreError


class Refusal(EvsysError):
    """A request that is answered with an error status.

    The SDK gives up at once at 400, 401, 403, 404, 405, 410, 413, 415 and 422; 429 and 503 it tries again.

    Attributes:
        status: HTTP status.
        headers: that go with it.
    """

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}

    @classmethod
    def of(cls, error: EvsysError) -> Refusal:
        """The answer to what the store or the engine refused."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, QueueFullError):
            return cls(429, str(error), headers={"retry-after": "1"})
        if isinstance(error, EngineClosedError | StoreError):
            return cls(503, str(error), headers={"retry-after": "2"})
        if isinstance(error, CheckpointError):
            return cls(404, str(error))
        return cls(400, str(error))

    def response(self) -> JSONResponse:
        """The HTTP response."""
        category = "user" if self.status < 500 else "server"
        body: dict[str, Any] = {"error": str(self), "category": category}
        return JSONResponse(body, status_code=self.status, headers=self.headers)


def bad_request(message: str) -> Refusal:
    """400: the request itself is wrong."""
    return Refusal(400, message)


def not_found(what: str) -> Refusal:
    """404, worded alike for what does not exist and for what is another key's."""
    return Refusal(404, f"there is no {what} here")


def not_offered(what: str, why: str) -> Refusal:
    """404 for a part of the protocol that this server leaves out."""
    return Refusal(404, f"{what} is not offered by this server: {why}")
