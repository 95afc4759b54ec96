"""A failed forward_backward: until the next optimizer step, its part of the accumulated gradient is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import WireError
from nat_plugin_evsys.service.store.operations import Operation
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.wire.scan import is_forward_only
from nat_plugin_evsys.service.work.failures import error_of

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store


@dataclass(frozen=True)
class LostGradient:
    """The failed operation.

    Attributes:
        seq_id: of it.
        error: its message.
        stored_at: when its failure was stored, seconds since the epoch.
    """

    seq_id: int
    error: str
    stored_at: float


def loses_gradient(operation: Operation) -> bool:
    """Whether the gradient is incomplete if this operation fails: forward_backward, but not forward."""
    if operation.kind != OperationKind.FORWARD_BACKWARD:
        return False
    try:
        return not is_forward_only(operation.payload)
    except WireError:
        return True


def recall_lost_gradient(store: Store, model_id: str, since: int) -> LostGradient | None:
    """The last one of a model after operation ``since``, from the store."""
    lost = None
    for operation, outcome, ended_at in store.failures(model_id, since):
        if loses_gradient(operation):
            lost = LostGradient(operation.seq_id, error_of(outcome), ended_at)
    return lost
