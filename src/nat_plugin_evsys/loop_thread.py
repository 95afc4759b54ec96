"""An event loop in a thread of its own, for connections that several threads and event loops use."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from nat_plugin_evsys.errors import EngineClosedError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines until it is closed. Safe to use from several threads.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """True from the beginning of ``close`` on: a coroutine that is cancelled can tell by it why."""
        return self._closed

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine. Cancelling its future cancels it.

        Raises:
            EngineClosedError: ``close`` has been called.
        """
        with self._lock:
            if self._closed:
                coroutine.close()
                raise EngineClosedError(f"{self._thread.name} has been closed")
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, last: Callable[[], Awaitable[None]] | None = None) -> None:
        """Cancel what runs, wait until it has ended, await ``last()`` and end the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        # Whatever ``run`` was given has begun when this does, so that it sees its own cancellation.
        try:
            asyncio.run_coroutine_threadsafe(_cancel_others(last), self._loop).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _cancel_others(last: Callable[[], Awaitable[None]] | None) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if last is not None:
        await last()
