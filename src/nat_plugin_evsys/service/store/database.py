"""The SQLite file behind the store: opened by one process at a time, in a schema that this version knows."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sqlalchemy import Connection, Engine, Row, Select, create_engine, event
from sqlalchemy.exc import DBAPIError

from nat_plugin_evsys.errors import ConfigError, StoreError
from nat_plugin_evsys.files import hold_file
from nat_plugin_evsys.service.store.group_commit import GroupCommit
from nat_plugin_evsys.service.store.tables import SCHEMA_VERSION, metadata

P = ParamSpec("P")
T = TypeVar("T")

_BUSY_MS = 10_000
_READERS = 4
_WAL_LIMIT_BYTES = 64 * 2**20
_MAX_FREED_PAGES = 16384


class Database:
    """Writes in groups on its own thread; reads immediately on any thread, seeing committed data.

    A commit survives the death of the process at any moment. After a power failure the last ones may be missing, but
    the file is intact (``synchronous=NORMAL``).

    Args:
        root: directory of the store; created if missing.

    Raises:
        ConfigError: another process has it open, a newer version wrote it, or it cannot be used as a store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / "service.sqlite"
        try:
            root.mkdir(parents=True, exist_ok=True)
            in_use = f"the store {root} is in use by another server; stop that one, or choose another directory"
            self._lock = hold_file(root / "service.lock", in_use)
        except OSError as exc:
            raise ConfigError(f"the store {root} cannot be used: {exc}") from exc
        try:
            self._reader = _engine(self.path)  # begins no transactions: each statement sees what is committed
            with self._reader.connect() as connection:
                _check_version(connection, self.path)
                connection.exec_driver_sql("PRAGMA auto_vacuum=INCREMENTAL")  # heeded before the first table is made
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            self._engine = _engine(self.path)
            event.listen(self._engine, "begin", _begin)
            with self._engine.begin() as connection:
                _make_tables(connection)
        except DBAPIError as exc:
            self._lock.close()
            raise ConfigError(f"{self.path} cannot be used as a store: {exc.orig}") from exc
        except ConfigError:
            self._lock.close()
            raise
        self._writer = GroupCommit(self._engine, self._rolled_back)
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="evsys-store-read")

    def close(self) -> None:
        """Commit pending writes and let another process open the store. Idempotent."""
        self._writer.close()
        self._readers.shutdown(wait=True)
        self._reader.dispose()
        self._engine.dispose()
        self._lock.close()

    def reading(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a reading function in one of the store's threads: for event loops, which must not wait for a disk.

        Raises:
            StoreError: the store has been closed.
        """
        try:
            return self._readers.submit(function, *args, **kwargs)
        except RuntimeError as exc:
            raise StoreError("the store has been closed") from exc

    def _write(self, function: Callable[[Connection], T]) -> Future[T]:
        return self._writer.submit(function)

    def _rows(self, statement: Select[Any]) -> Sequence[Row[Any]]:
        """All rows of ``statement``.

        Raises:
            StoreError: the database could not be read.
        """
        try:
            with self._reader.connect() as connection:
                return connection.execute(statement).all()
        except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 cannot carry: nothing is kept under such a key
            return []
        except DBAPIError as exc:
            raise StoreError(f"{self.path} could not be read: {exc.orig}") from exc

    def _row(self, statement: Select[Any]) -> Row[Any] | None:
        """The one row of ``statement``, or None."""
        rows = self._rows(statement)
        return rows[0] if rows else None

    def _rolled_back(self) -> None:
        """A group of writes was rolled back: what is cached about them must be read again."""


def give_back_space(connection: Connection) -> None:
    """Shrink the file by its free pages, at most 64 MiB."""
    free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
    driver = connection.connection.driver_connection
    assert driver is not None
    for _ in range(min(free, _MAX_FREED_PAGES)):
        driver.execute("PRAGMA incremental_vacuum(1)").close()  # one page for each step, and the driver steps once


def _engine(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}", pool_size=8, max_overflow=-1, connect_args={"timeout": _BUSY_MS / 1000})

    @event.listens_for(engine, "connect")
    def connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver must not begin or commit by itself, or savepoints break
        for pragma in (
            "synchronous=NORMAL",
            "foreign_keys=ON",
            f"busy_timeout={_BUSY_MS}",
            f"journal_size_limit={_WAL_LIMIT_BYTES}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _check_version(connection: Connection, path: Path) -> None:
    """Raises ConfigError unless the file is empty or has the schema of this version."""
    version = _version(connection)
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema version {version}, and this version of nat_plugin_evsys knows only up to "
            f"{SCHEMA_VERSION}: it was written by a newer one; upgrade, or choose another directory"
        )
    if version == 0 and connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one():
        raise ConfigError(f"{path} is not a store of this server: it has tables but no schema version")


def _make_tables(connection: Connection) -> None:
    if _version(connection) == 0:
        metadata.create_all(connection)
        connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")


def _version(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
