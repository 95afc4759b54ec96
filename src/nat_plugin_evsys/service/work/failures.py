"""The answer to a client's future: a result, or the failure made from an exception."""

from __future__ import annotations

import json
import logging
from typing import Any

from nat_plugin_evsys.errors import (
    EngineClosedError,
    EvsysError,
    ModelError,
    ReplicaError,
    RestoreError,
    StoreError,
    one_line,
)
from nat_plugin_evsys.service.store.operations import JSON, Effect, FailureCategory, Operation, Outcome

logger = logging.getLogger(__name__)

_OF_SERVER = (EngineClosedError, ReplicaError, RestoreError, StoreError)


def answer(effect: Effect = Effect.NONE, **facts: Any) -> Outcome:
    """A JSON Outcome."""
    return Outcome(json.dumps(facts).encode(), JSON, effect=effect)


def failure(message: str, category: FailureCategory = FailureCategory.USER, effect: Effect = Effect.NONE) -> Outcome:
    """A failed Outcome."""
    body = json.dumps({"error": message, "category": category.value}).encode()
    return Outcome(body, JSON, failed=True, effect=effect)


def failure_of(operation: Operation, error: Exception, effect: Effect = Effect.NONE) -> Outcome:
    """The failed Outcome of an operation that raised ``error``.

    The user can fix what this package raises on purpose, unless the disk or the machine caused it. Anything
    else is a fault of the server; the log has all of it.
    """
    if not isinstance(error, EvsysError):
        logger.exception("%s %s of %s failed", operation.kind, operation.seq_id, operation.scope, exc_info=error)
        message = f"{operation.kind} failed in the server: {one_line(error)}"
        return failure(message, FailureCategory.SERVER, effect)
    of_server = isinstance(error, _OF_SERVER) or isinstance(error.__cause__, OSError)
    of_server = of_server or (isinstance(error, ModelError) and error.__cause__ is not None)
    return failure(str(error), FailureCategory.SERVER if of_server else FailureCategory.USER, effect)


def error_of(outcome: Outcome) -> str:
    """The message of a failed Outcome."""
    return str(json.loads(outcome.body)["error"])
