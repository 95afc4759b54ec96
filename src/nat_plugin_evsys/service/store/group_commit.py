"""One thread that writes to the database. Waiting writes are committed together; each fails on its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from nat_plugin_evsys.errors import EvsysError, StoreError

T = TypeVar("T")

_MAX_GROUP = 256


class GroupCommit:
    """Runs functions on one connection, in the order given; their futures resolve after the commit.

    A submitted write happens even if its future is cancelled.

    Args:
        engine: of the database; ``close`` does not dispose of it.
        on_rollback: called on the writer's thread after a whole group failed to commit.
    """

    def __init__(self, engine: Engine, on_rollback: Callable[[], None]) -> None:
        self._engine = engine
        self._on_rollback = on_rollback
        self._path = str(engine.url.database)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="evsys-store", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[Connection], T]) -> Future[T]:
        """Run ``function`` within the next transaction.

        The future fails with the ``EvsysError`` that the function raised, or with a ``StoreError``.
        """
        write = _Write(function, self._path)
        with self._lock:
            if not self._closed:
                self._queue.put(write)
                return write.future
        write.future.set_exception(StoreError("the store has been closed"))
        return write.future

    def close(self) -> None:
        """Commit pending writes, then stop."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        with self._engine.connect() as connection:
            for group in self._groups():
                self._commit(connection, group)

    def _groups(self) -> Iterator[list[_Write]]:
        """Waiting writes, up to ``_MAX_GROUP`` at a time, until the end mark."""
        while (write := self._queue.get()) is not None:
            group = [write]
            last = False
            while len(group) < _MAX_GROUP and not last:
                try:
                    following = self._queue.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    last = True
                else:
                    group.append(following)
            yield group
            if last:
                return

    def _commit(self, connection: Connection, group: list[_Write]) -> None:
        try:
            with connection.begin():
                for write in group:
                    write.run(connection)
        except Exception as exc:  # noqa: BLE001 - boundary: every waiting caller is told
            if (driver := connection.connection.driver_connection) is not None:
                driver.rollback()  # SQLite leaves a transaction open whose COMMIT failed
            self._on_rollback()
            for write in group:
                write.error = write.error or _readable(exc, self._path)
        for write in group:
            write.resolve()


class _Write:
    """One function and its result."""

    def __init__(self, function: Callable[[Connection], Any], path: str) -> None:
        self.function = function
        self.path = path
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # from here on, nobody can take the write back
        self.result: Any = None
        self.error: EvsysError | None = None

    def run(self, connection: Connection) -> None:
        """Run in a savepoint: a failure undoes only this write. Raises errors that made SQLite undo the group."""
        savepoint = connection.begin_nested()
        try:
            self.result = self.function(connection)
        except Exception as exc:  # noqa: BLE001 - boundary: kept for the caller
            self.error = _readable(exc, self.path)
            try:
                savepoint.rollback()
            except DBAPIError:  # no savepoint is left: after a full disk, SQLite has undone the transaction by itself
                raise exc from None
        else:
            savepoint.commit()

    def resolve(self) -> None:
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def _readable(exc: Exception, path: str) -> EvsysError:
    if isinstance(exc, EvsysError):
        return exc
    error = StoreError(f"the store could not write {path}: {getattr(exc, 'orig', None) or exc}")
    error.__cause__ = exc
    return error
