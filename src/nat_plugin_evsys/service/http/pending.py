"""Long polls: who waits for which operation's outcome."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from nat_plugin_evsys.service.http.refusals import not_found

if TYPE_CHECKING:
    from nat_plugin_evsys.service.http.metrics import ServiceMetrics
    from nat_plugin_evsys.service.store.store import Store, StoredOutcome

logger = logging.getLogger(__name__)


class Pending:
    """Wakes the long polls of an operation when its outcome has been stored.

    Made, and awaited on, in one event loop; only ``finished`` may be called from other threads.

    Args:
        store: where outcomes are.
        metrics: counts what has ended.
        poll_seconds: how long a poll waits.
    """

    def __init__(self, store: Store, metrics: ServiceMetrics, poll_seconds: float) -> None:
        self._store = store
        self._metrics = metrics
        self._poll_seconds = poll_seconds
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[str, set[asyncio.Future[StoredOutcome | None]]] = {}
        self._closed = False

    def finished(self, request_id: str) -> None:
        """Tell whoever waits; called from the engine's threads after the outcome was stored."""
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._wake, request_id)

    def _wake(self, request_id: str) -> None:
        stored = self._store.outcome(request_id)
        if stored is None or stored.outcome is None:  # forgotten with its session meanwhile
            return
        self._metrics.operation_finished(stored.kind, failed=stored.outcome.failed)
        for waiter in self._waiters.pop(request_id, ()):
            if not waiter.done():
                waiter.set_result(stored)

    async def outcome(self, request_id: str, owner: str) -> StoredOutcome | None:
        """The ended operation, or None when the poll's time is up or the server shuts down.

        Raises:
            Refusal: 404, there is no such request, or it is another key's.
        """
        stored = self._store.outcome(request_id)
        if stored is None or stored.owner != owner:
            raise not_found(f"request {request_id[:64]!r}")
        if stored.outcome is None and not self._closed:
            # No await since the read: an outcome that was stored after it wakes this waiter.
            stored = await self._wait(request_id)
        if stored is None or stored.outcome is None:
            return None
        if stored.delivered_at is None:
            self._store.mark_delivered(request_id).add_done_callback(_log_failure)
        return stored

    async def _wait(self, request_id: str) -> StoredOutcome | None:
        waiter: asyncio.Future[StoredOutcome | None] = self._loop.create_future()
        waiters = self._waiters.setdefault(request_id, set())
        waiters.add(waiter)
        try:
            return await asyncio.wait_for(waiter, self._poll_seconds)
        except TimeoutError:
            return None
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(request_id) is waiters:
                del self._waiters[request_id]

    @property
    def waiting(self) -> int:
        """Long polls that are held now."""
        return sum(len(waiters) for waiters in self._waiters.values())

    def close(self) -> None:
        """Answer every poll now, and hold none any more."""
        self._closed = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _log_failure(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("a delivery could not be noted (the result is kept longer): %s", error)
