"""One worker thread that runs operations in submission order, and the future each submission returns."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

from nat_plugin_evsys.errors import EngineClosedError

T = TypeVar("T")


class OperationCancelled(Exception):
    """Raised inside a running operation whose awaiting task was cancelled."""


class OperationFuture(Generic[T]):
    """The result of one operation: ``await`` it in any event loop, or block on ``result(timeout)``.

    Cancelling the awaiting task cancels the operation: one that has not started never does, a running one stops at its
    next ``check_cancelled``.
    """

    def __init__(self) -> None:
        self._future: Future[T] = Future()
        self._cancel_requested = threading.Event()

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        try:
            return await asyncio.wrap_future(self._future)
        except asyncio.CancelledError:
            self._cancel_requested.set()
            raise

    def result(self, timeout: float | None = None) -> T:
        """Block until done (``TimeoutError`` after ``timeout`` seconds) and return the result or raise its error."""
        return self._future.result(timeout)

    def done(self) -> bool:
        """True once there is a result, an error or a cancellation."""
        return self._future.done()

    def cancel(self) -> None:
        """Ask the operation to stop."""
        self._cancel_requested.set()
        self._future.cancel()

    def check_cancelled(self) -> None:
        """For the operation itself: raises ``OperationCancelled`` when nobody waits for it any more."""
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
    """Runs callables one after the other in a thread of its own. A failure reaches its own future only."""

    def __init__(self, name: str) -> None:
        self._queue: queue.Queue[tuple[OperationFuture[Any], Callable[[OperationFuture[Any]], Any]] | None]
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

    def submit(self, operation: Callable[[OperationFuture[T]], T]) -> OperationFuture[T]:
        """Queue ``operation(future)``; never blocks.

        Raises:
            EngineClosedError: the queue has been closed.
        """
        future: OperationFuture[T] = OperationFuture()
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
            future._fail(exc)
        finally:
            self._running = None
