"""One operation that a client asked for, and how it ended: the store keeps it, the engine executes it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from nat_plugin_evsys.service.wire.decode import Request, decode
from nat_plugin_evsys.service.wire.kinds import OperationKind

JSON = "application/json"
PROTOBUF = "application/x-protobuf"


class Effect(StrEnum):
    """What an ended operation did to the model's weights, moments or gradient, and a replay must repeat."""

    NONE = "none"
    APPLIED = "applied"
    CLEARED = "cleared"
    """A refused optimizer step: the accumulated gradient was thrown away."""


class FailureCategory(StrEnum):
    """Who can fix a failure; the SDK's ``RequestErrorCategory``."""

    USER = "user"
    SERVER = "server"


@dataclass(frozen=True)
class Operation:
    """One request, exactly as it came.

    Attributes:
        request_id: of its future; unique.
        owner: identity of the key that sent it.
        kind: what is asked for.
        scope: the model id (training) or the sampling session id (``asample``) that orders and de-duplicates it.
        seq_id: within its scope; training operations of one model run in its order.
        payload: the request's body, decompressed: protobuf for ``forward_backward``, JSON for all others.
        created_at: seconds since the epoch.
        value: the JSON object in the payload, if it is already parsed; not stored.
    """

    request_id: str
    owner: str
    kind: OperationKind
    scope: str
    seq_id: int
    payload: bytes
    created_at: float = field(default_factory=time.time)
    value: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def request(self) -> Request:
        """The payload, decoded once, at its first use.

        Raises:
            DataError: it is malformed.
        """
        return decode(self.kind, self.payload, self.value)


@dataclass(frozen=True)
class Outcome:
    """How an operation ended: the body that answers its future.

    Attributes:
        body: JSON, or protobuf for results of ``forward_backward`` and ``asample``; a failure is always JSON,
            ``{"error": …, "category": …}``.
        content_type: of the body.
        failed: the body is a failure.
        effect: see ``Effect``.
    """

    body: bytes
    content_type: str
    failed: bool = False
    effect: Effect = Effect.NONE
