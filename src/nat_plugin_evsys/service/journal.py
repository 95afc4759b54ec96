"""Writes how operations ended: into the store first, then to those who wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import EvsysError
from nat_plugin_evsys.service.operations import Operation, Outcome

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store import Store

logger = logging.getLogger(__name__)

_RETRY_S = 2.0


class Journal:
    """The ends of operations. Safe to use from several threads.

    Args:
        store: where they are kept.
        on_finished: told each request's id once its outcome is stored.
    """

    def __init__(self, store: Store, on_finished: Callable[[str], None]) -> None:
        self.store = store
        self._on_finished = on_finished
        self._closing = threading.Event()

    def finish(self, operation: Operation, outcome: Outcome, next_seq: int | None = None) -> bool:
        """Store an outcome, waiting out a store that refuses (a full disk), then tell. False: the engine closed first.

        Of a request that the store no longer knows, nothing is kept.
        """
        while True:
            try:
                self.store.finish_operation(operation.request_id, outcome, next_seq=next_seq).result()
                break
            except EvsysError as exc:
                if self.store.outcome(operation.request_id) is None:
                    return True
                logger.error("the outcome of %s could not be stored, trying again: %s", operation.request_id, exc)
            if self._closing.wait(_RETRY_S):
                return False
        try:
            self._on_finished(operation.request_id)
        except Exception:  # boundary: a listener's fault is not the operation's
            logger.exception("on_finished(%r) failed", operation.request_id)
        return True

    def close(self) -> None:
        """Do not wait for the store any longer."""
        self._closing.set()
