"""Stores the end of an operation, retrying until it succeeds."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import EvsysError
from nat_plugin_evsys.service.store.operations import Operation, Outcome

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)

_RETRY_S = 2.0


def end(
    store: Store, operation: Operation, outcome: Outcome, closing: threading.Event, *, next_seq: int | None = None
) -> bool:
    """Store an outcome, waiting out a store that refuses (a full disk). Keeps nothing for a
    request that the store no longer knows.

    Args:
        closing: set when the engine closes; waiting for the store ends then.
        next_seq: see ``Store.finish_operation``.

    Returns:
        False: the engine closed first, and the operation is unfinished.
    """
    while True:
        try:
            store.finish_operation(operation.request_id, outcome, next_seq=next_seq).result()
            return True
        except EvsysError as exc:
            if _forgotten(store, operation):
                return True
            logger.error("the outcome of %s could not be stored, trying again: %s", operation.request_id, exc)
        if closing.wait(_RETRY_S):
            return False


def _forgotten(store: Store, operation: Operation) -> bool:
    """Whether the store no longer knows the request; False where it cannot say."""
    try:
        return store.outcome(operation.request_id) is None
    except EvsysError:
        return False
