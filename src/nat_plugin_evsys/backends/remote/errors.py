"""Maps failures of a Tinker service to a ``ServiceError``, or to the error that the embedded engine would raise."""

from __future__ import annotations

import re
from typing import Any, Literal

from nat_plugin_evsys.errors import (
    ConfigError,
    EvsysError,
    PromptTooLongError,
    ServiceCheckpointError,
    ServiceDataError,
    ServiceError,
    ServiceGradientError,
    ServiceLostError,
    ServiceUnavailableError,
    UnsupportedError,
)

Purpose = Literal["start", "data", "step", "save", "checkpoint", "sample"]
"""What an operation is about, which decides what a refusal of it means; ``checkpoint`` is one that must be there."""

_REQUEST_FAILED = re.compile(r"Request failed: (?P<words>.*) for self\.request_id=.*? and expected type ", re.DOTALL)
_STATUS = re.compile(r"\bstatus (?P<status>\d{3})\b")
_NOT_FINITE = re.compile(r"\b(not|non)[- ]?finite\b|\bnan\b|\binf\b", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"prompt has (?P<prompt>\d+) tokens and (?P<more>\d+) more .* context length is (?P<context>\d+)", re.DOTALL
)
_GO_ON = "continue from the last finished epoch with `resume: true` on the trainer"


_REFUSALS: dict[Purpose, type[ServiceError]] = {
    "data": ServiceDataError,
    "save": ServiceCheckpointError,
    "checkpoint": ServiceCheckpointError,
}


def readable(error: BaseException, *, what: str, purpose: Purpose, where: str, key_from: str) -> BaseException:
    """The error to raise for what the SDK raised: the service's own words, its category, and what to type.

    Args:
        what: the operation, for the message.
        where: the service's URL; ``key_from``: where its key comes from.
    """
    import tinker

    if isinstance(error, EvsysError) or not isinstance(error, Exception):
        return error
    if isinstance(error, tinker.RequestFailedError):
        found = _REQUEST_FAILED.match(error.message)
        words = found["words"] if found else error.message
        return _failed(words, str(error.category), error.request_id, what=what, purpose=purpose, where=where)
    if isinstance(error, tinker.APIConnectionError | TimeoutError):
        return ServiceUnavailableError(
            f"{what}: the service at {where} does not answer ({error}); start it again on the same store and {_GO_ON}",
            category="server",
        )
    if isinstance(error, tinker.APIStatusError):
        return _status(error.status_code, _words(error), what=what, purpose=purpose, where=where, key_from=key_from)
    if isinstance(error, tinker.TinkerError):
        return ServiceError(f"{what}: {error} (service at {where})")
    return _raised_by_sdk(error, what=what, purpose=purpose, where=where, key_from=key_from)


def _failed(
    words: str, category: str, request_id: str | None, *, what: str, purpose: Purpose, where: str
) -> EvsysError:
    if too_long := _TOO_LONG.search(words):
        return PromptTooLongError(int(too_long["prompt"]), int(too_long["more"]), int(too_long["context"]))
    kind = _REFUSALS.get(purpose, ServiceError) if category == "user" else ServiceError
    if purpose == "step" and category == "user" and _NOT_FINITE.search(words):
        kind = ServiceGradientError
    advice = "; set `checkpoint:` to one it has" if purpose == "checkpoint" and category == "user" else ""
    text = f"{what}: {words}{advice} (service at {where}, category {category}, request {request_id})"
    return kind(text, category=category, request_id=request_id)


def _status(status: int, words: str, *, what: str, purpose: Purpose, where: str, key_from: str) -> EvsysError:
    if status == 401 or (status == 403 and purpose == "start"):
        return ConfigError(f"{what}: the service at {where} rejects the key from {key_from}: {words}")
    if status in (403, 404) and purpose == "checkpoint":
        return ServiceCheckpointError(
            f"{what}: the service at {where} does not have it (any more): {words}; set `checkpoint:` to one it has",
            category="user",
        )
    if status in (404, 410):
        return ServiceLostError(
            f"{what}: the service at {where} has lost this run's model or sampler ({words}): it was started on "
            f"another store, or the session ended. It is not recreated automatically; {_GO_ON}",
            category="server",
        )
    category = "server" if status >= 500 or status in (408, 429) else "user"
    kind = _REFUSALS.get(purpose, ServiceError) if category == "user" else ServiceError
    return kind(f"{what}: HTTP {status}: {words} (service at {where})", category=category)


def _raised_by_sdk(error: Exception, *, what: str, purpose: Purpose, where: str, key_from: str) -> BaseException:
    """What the SDK raises as a plain ValueError, RuntimeError or TypeError."""
    text = str(error)
    if isinstance(error, ValueError) and text.startswith("Error retrieving result:"):
        status = _STATUS.search(text)
        if status is not None:
            # the promise is the service's: a result that it does not know is lost, whatever it was about
            return _status(
                int(status["status"]), text.partition(" with status")[0], what=what, purpose="start", where=where,
                key_from=key_from,
            )  # fmt: skip
        return ServiceError(f"{what}: {text} (service at {where})", category="server")
    if (isinstance(error, ValueError) and "deserialization failed" in text) or "only supports as proto" in text:
        return ServiceError(f"{what}: the service at {where} speaks another version of the protocol: {text}")
    if isinstance(error, AssertionError) and "sample_sequence_ids" in text:
        return ServiceError(
            f"{what}: the service at {where} speaks an older protocol than the installed tinker SDK ({text}); install "
            "the release that the service was made for (SkyRL: `pip install tinker==0.24.1`)",
            category="server",
        )
    if isinstance(error, RuntimeError) and "poisoned" in text:
        return ServiceError(f"{what}: an earlier custom loss failed, and the SDK accepts nothing after it; {_GO_ON}")
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return UnsupportedError(f"{what}: the installed tinker SDK has no such option ({text}); upgrade tinker")
    if type(error).__name__ == "RetryableException":
        return ServiceLostError(f"{what}: the service at {where} has lost the request ({text}); {_GO_ON}")
    return error


def _words(error: Any) -> str:
    """What the service says in the body of an error response."""
    body = error.body
    for step in ("error", "detail", "message"):
        if isinstance(body, dict) and step in body:
            body = body[step]
            if isinstance(body, dict):
                body = body.get("message", body)
    return body if isinstance(body, str) and body else str(error.message)
