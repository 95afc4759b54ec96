"""Long polls: which client waits for which operation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

from nat_plugin_evsys.service.http.refusals import not_found

if TYPE_CHECKING:
    from nat_plugin_evsys.service.http.prometheus import ServiceMetrics
    from nat_plugin_evsys.service.store.store import Store, StoredOutcome

logger = logging.getLogger(__name__)

Waiter: TypeAlias = "asyncio.Future[StoredOutcome | None]"


class Pending:
    """Wakes the long polls of an operation when its outcome has been stored.

    Created and awaited in one event loop.

    Args:
        store: holds outcomes and reports which operation has ended.
        metrics: counts ended operations.
        poll_seconds: how long a poll waits.
    """

    def __init__(self, store: Store, metrics: ServiceMetrics, poll_seconds: float) -> None:
        self._store = store
        self._metrics = metrics
        self._poll_seconds = poll_seconds
        self._loop = asyncio.get_running_loop()
        self._waiters: dict[str, set[Waiter]] = {}
        self._closed = False
        store.watch_ends(self._ended)

    def _ended(self, stored: StoredOutcome) -> None:
        """Called in a thread of the store."""
        with suppress(RuntimeError):  # the loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self._wake, stored)

    def _wake(self, stored: StoredOutcome) -> None:
        self._metrics.operation_finished(stored.kind, failed=stored.outcome is None or stored.outcome.failed)
        for waiter in self._waiters.pop(stored.request_id, ()):
            if not waiter.done():
                waiter.set_result(stored)

    async def outcome(self, request_id: str, owner: str) -> StoredOutcome | None:
        """The ended operation, or None if the poll times out or the server shuts down.

        Raises:
            Refusal: 404, there is no such request, or it is another key's.
        """
        with self._waiter(request_id) as waiter:  # before the read: an outcome that is stored after it wakes the waiter
            stored = await asyncio.wrap_future(self._store.reading(self._store.outcome, request_id))
            if stored is None or stored.owner != owner:
                raise not_found(f"request {request_id[:64]!r}")
            if stored.outcome is None and not self._closed:
                stored = await self._result(waiter)
        if stored is None or stored.outcome is None:
            return None
        if stored.delivered_at is None:
            self._store.mark_delivered(request_id).add_done_callback(_log_failure)
        return stored

    @contextmanager
    def _waiter(self, request_id: str) -> Iterator[Waiter]:
        """A future that ``_wake`` resolves."""
        waiter: Waiter = self._loop.create_future()
        waiters = self._waiters.setdefault(request_id, set())
        waiters.add(waiter)
        try:
            yield waiter
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(request_id) is waiters:
                del self._waiters[request_id]

    async def _result(self, waiter: Waiter) -> StoredOutcome | None:
        try:
            return await asyncio.wait_for(waiter, self._poll_seconds)
        except TimeoutError:
            return None

    @property
    def waiting(self) -> int:
        """Long polls that are held now."""
        return sum(len(waiters) for waiters in self._waiters.values())

    def close(self) -> None:
        """Answer every poll now, and hold no more."""
        self._closed = True
        for waiters in self._waiters.values():
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)


def _log_failure(done: Future[None]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("a delivery could not be recorded (the result is kept longer): %s", error)
