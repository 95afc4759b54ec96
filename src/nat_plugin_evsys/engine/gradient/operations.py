"""One worker thread that runs operations in submission order, and the future each submission returns."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from tinker import APIFuture

from nat_plugin_evsys.errors import EngineClosedError, OperationCancelled
from nat_plugin_evsys.garbage import empty_frames

T = TypeVar("T")
F = TypeVar("F", bound="OperationFuture[Any]")


class OperationFuture(APIFuture[T]):
    """The result of one operation: ``await`` it in any event loop, or block on ``result(timeout)``.

    A ``tinker.APIFuture``. Cancelling the awaiting task cancels the operation: one that has not started never does, a
    running one stops at its next ``check_cancelled``.

    Args:
        future: where the operation's result arrives, if that exists already.
    """

    def __init__(self, future: Future[T] | None = None) -> None:
        self._future: Future[T] = Future() if future is None else future
        self._cancel_requested = threading.Event()
        self._worker: threading.Thread | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self._cancel_requested.set()
            raise

    def result(self, timeout: float | None = None) -> T:
        """Block until done (``TimeoutError`` after ``timeout`` seconds) and return the result or raise its error.

        Raises:
            RuntimeError: called by an operation that is before this one in the queue, which would wait forever.
        """
        if self._worker is threading.current_thread() and not self._future.done():
            raise RuntimeError("an operation cannot wait for one that is queued behind it; wait outside of it")
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> T:  # noqa: ASYNC109 - tinker.APIFuture's signature
        """Like ``await``, with a limit: ``TimeoutError`` after ``timeout`` seconds; the operation keeps running."""
        if timeout is None:
            return await self
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(asyncio.wrap_future(self._future))
        except asyncio.CancelledError:
            self.cancel()
            raise

    def future(self) -> Future[T]:
        """The ``concurrent.futures.Future`` beneath, for ``concurrent.futures.wait`` and done-callbacks."""
        return self._future

    def done(self) -> bool:
        """True once there is a result, an error or a cancellation."""
        return self._future.done()

    def cancel(self) -> None:
        """Ask the operation to stop."""
        self._cancel_requested.set()
        self._future.cancel()

    def check_cancelled(self) -> None:
        """For the operation itself: raises ``OperationCancelled`` if nobody waits for it any more."""
        if self._cancel_requested.is_set():
            raise OperationCancelled

    def _start(self) -> bool:
        return self._future.set_running_or_notify_cancel()

    def _resolve(self, result: T) -> None:
        self._future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            self._future.set_exception(error)


class OperationQueue:
    """Runs callables one after another in its own thread. A failure only reaches its own future."""

    def __init__(self, name: str) -> None:
        self._queue: queue.Queue[tuple[OperationFuture[Any], Callable[[Any], Any]] | None]
        self._queue = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._running: OperationFuture[Any] | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """True after ``close`` was called."""
        return self._closed

    def submit(self, operation: Callable[[F], Any], future: F) -> F:
        """Queue ``operation(future)``, whose result goes into ``future``; never blocks. Returns ``future``.

        Raises:
            EngineClosedError: the queue has been closed.
        """
        future._worker = self._thread
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine has been closed; create a new one")
            self._queue.put((future, operation))
        return future

    def close(self, timeout: float | None = None) -> None:
        """Fail what is queued with EngineClosedError, ask the running operation to stop, and wait for the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        running = self._running
        if running is not None:
            running._cancel_requested.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._run(*item)
            # An idle thread must not keep the last operation alive, and with it a model that nobody else knows.
            del item

    def _run(self, future: OperationFuture[T], operation: Callable[[OperationFuture[T]], T]) -> None:
        if self._closed:
            future._fail(EngineClosedError("the engine was closed before this operation started"))
            return
        if not future._start():
            return
        self._running = future
        try:
            if self._closed:
                raise OperationCancelled
            future._resolve(operation(future))
        except OperationCancelled:
            stopped = EngineClosedError("the engine was closed while this operation ran; it changed nothing")
            future._fail(stopped if self._closed else CancelledError())
        except BaseException as exc:  # noqa: BLE001 - boundary: whatever an operation raises belongs to its future
            empty_frames(exc)
            future._fail(exc)
        finally:
            self._running = None
