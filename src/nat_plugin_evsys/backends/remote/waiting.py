"""Waiting for a Tinker service, with log lines that say what it is waiting for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nat_plugin_evsys.backends.remote.errors import Purpose
from nat_plugin_evsys.backends.remote.service import TinkerService
from nat_plugin_evsys.errors import ServiceUnavailableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

REPORT_SECONDS = 15.0
"""Seconds between two log lines on what is waited for."""

OUTAGE_SECONDS = 300.0
"""Seconds that a service may be out of reach before what waits for it fails; the SDK's own bound for a submission."""


class ServiceWatch:
    """Waits for results of one service. Shared by all waiters, in any thread or event loop: one log line for all."""

    def __init__(self, service: TinkerService) -> None:
        self.service = service
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()
        self._looked_at = 0.0
        self._down_since: float | None = None

    async def wait(self, future: Future[T], what: str, purpose: Purpose, *, cancel: bool = False) -> T:
        """Wait for a result of the SDK, logging every ``REPORT_SECONDS`` what it waits for.

        The SDK continues on its own once a restarted service is back.

        Args:
            cancel: cancelling the awaiting task also cancels ``future``. Never for operations on a model: one that is
                taken back before it was sent leaves a gap in their order.

        Raises:
            ServiceUnavailableError: the service was unreachable for ``OUTAGE_SECONDS``.
            EvsysError: what ``readable`` makes of the operation's own error.
        """
        waiter = asyncio.wrap_future(future)
        waiter.add_done_callback(_retrieved)
        with self._lock:
            self._pending[what] += 1
        started = time.monotonic()
        try:
            while not (await asyncio.wait({waiter}, timeout=REPORT_SECONDS))[0]:
                await self._report(what, started)
            result = waiter.result()
            self._down_since = None  # it answers
            return result
        except Exception as error:
            found = self.service.readable(error, what, purpose)
            if found is error:
                raise
            raise found from None
        finally:
            with self._lock:
                self._pending[what] -= 1
            if cancel and not waiter.done():
                waiter.cancel()

    async def _report(self, what: str, started: float) -> None:
        with self._lock:
            due = time.monotonic() - self._looked_at >= REPORT_SECONDS / 2
            if due:
                self._looked_at = time.monotonic()
        if due:
            problem = await asyncio.to_thread(self.service.problem)
            self._tell(problem, started)
        down = self._down_since
        if down is not None and time.monotonic() - down > OUTAGE_SECONDS:
            raise ServiceUnavailableError(
                f"{what}: the service at {self.service.url} has been unreachable for {OUTAGE_SECONDS:.0f} s; start it "
                "again on the same store and continue from the last finished epoch with `resume: true` on the trainer",
                category="server",
            )

    def _tell(self, problem: str | None, started: float) -> None:
        now = time.monotonic()
        with self._lock:
            waiting = ", ".join(f"{count} x {what}" for what, count in sorted(self._pending.items()) if count)
            if problem is None:
                self._down_since = None
            elif self._down_since is None:
                self._down_since = now
            down = 0.0 if self._down_since is None else now - self._down_since
        url = self.service.url
        if problem is None:
            logger.info("waiting for %s for %.0f s; the service at %s answers", waiting, now - started, url)
        else:
            logger.warning(
                "waiting for %s: the service at %s does not answer (%s); %.0f s of at most %.0f s. The run continues "
                "once it is started again on the same store",
                *(waiting, url, problem, down, OUTAGE_SECONDS),
            )


def sdk_future(returned: Any) -> Future[Any]:
    """The ``concurrent.futures.Future`` of what a call of the SDK returned: of its releases, the older give the future
    or the result itself, the newer an APIFuture."""
    import tinker

    if isinstance(returned, tinker.APIFuture):
        return returned.future() if hasattr(returned, "future") else in_thread(returned.result, "evsys-result")
    if isinstance(returned, Future):
        return returned
    done: Future[Any] = Future()
    done.set_result(returned)
    return done


def in_thread(call: Callable[[], T], name: str) -> Future[T]:
    """Run a blocking call of the SDK in a daemon thread, so that one that never ends keeps no process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _retrieved(waiter: asyncio.Future[Any]) -> None:
    """Whoever stopped waiting does not ask for the error any more; asyncio would log it as never retrieved."""
    if not waiter.cancelled():
        waiter.exception()
