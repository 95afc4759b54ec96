"""The store's operations: the journal from which a killed server comes back to where it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from sqlalchemy import Connection, and_, delete, func, or_, select, update

from nat_plugin_evsys.errors import QueueFullError, StoreError
from nat_plugin_evsys.service.store.database import Database, give_back_space
from nat_plugin_evsys.service.store.operation_rows import (
    drop_payload,
    end_operation,
    insert_operation,
    move_on,
    payload_bytes,
    refuse_second_end,
    same_operation,
    stored_outcome,
    to_operation,
    to_outcome,
    with_payload,
)
from nat_plugin_evsys.service.store.operations import Operation, Outcome
from nat_plugin_evsys.service.store.queue_bound import QueueBound
from nat_plugin_evsys.service.store.rows import StoredOutcome
from nat_plugin_evsys.service.store.tables import SAMPLE, operations, payloads, results, sessions

logger = logging.getLogger(__name__)

DELIVERED_S = 3600.0
"""How long a result is kept after it was first delivered."""

UNDELIVERED_S = 24 * 3600.0
"""How long a result is kept that nobody asked for."""


class OperationLog(Database):
    """The part of ``Store`` that keeps operations and how they ended."""

    def __init__(
        self,
        root: Path,
        *,
        max_queued_per_owner: int = 4096,
        max_queued: int = 16384,
        max_queued_bytes_per_owner: int = 4 << 30,
    ) -> None:
        self._queue = QueueBound(max_queued_per_owner, max_queued, max_queued_bytes_per_owner)
        self._watchers: list[Callable[[StoredOutcome], None]] = []
        super().__init__(Path(root))

    def add_operation(self, operation: Operation) -> Future[tuple[str, bool]]:
        """Keep a new operation; returns (request id, True), or (id, False) if its scope and seq_id are known.

        The future fails with ``QueueFullError`` if the queue is full, and with ``StoreError`` if the scope and
        seq_id are another owner's.
        """

        def write(connection: Connection) -> tuple[str, bool]:
            full = self._queue.full(connection, operation.owner)
            if full is None and insert_operation(connection, operation):
                self._queue.queued(operation.owner, len(operation.payload))
                return operation.request_id, True
            known = connection.execute(same_operation(operation)).first()
            if known is None:
                raise QueueFullError(full)
            if known.owner != operation.owner:
                raise StoreError(f"operation {operation.seq_id} of {operation.scope} belongs to another owner")
            return known.request_id, False

        return self._write(write)

    def finish_operation(
        self, request_id: str, outcome: Outcome, *, next_seq: int | None = None
    ) -> Future[StoredOutcome | None]:
        """Keep how an operation ended and, in the same commit, which of its model's operations is next.

        An operation ends once: a later outcome is dropped, and logged, and its future gives None. The future fails
        with ``StoreError`` when the request is unknown (its session was forgotten).
        """

        def write(connection: Connection) -> StoredOutcome | None:
            ended = end_operation(connection, request_id, outcome)
            if ended is None:
                refuse_second_end(connection, request_id)
                return None
            size = payload_bytes(connection, ended.id)
            if ended.family == SAMPLE:
                drop_payload(connection, ended.id)
            if next_seq is not None:
                move_on(connection, ended.scope, next_seq)
            self._queue.ended(ended.owner, size)
            return stored_outcome(ended, outcome)

        writing = self._write(write)
        writing.add_done_callback(self._tell)
        return writing

    def watch_ends(self, watcher: Callable[[StoredOutcome], None]) -> None:
        """Call ``watcher``, in a thread of the store, with the outcome of each operation that has ended."""
        self._watchers.append(watcher)

    def _tell(self, writing: Future[StoredOutcome | None]) -> None:
        if writing.exception() is not None or (stored := writing.result()) is None:
            return
        for watcher in self._watchers:
            try:
                watcher(stored)
            except Exception:  # boundary: a watcher's fault is not the operation's
                logger.exception("a watcher of the end of %s failed", stored.request_id)

    def outcome(self, request_id: str) -> StoredOutcome | None:
        """The state of a request; None if it is unknown or its result has expired."""
        row = self._row(
            select(operations, results.c.body)
            .outerjoin(results, results.c.operation == operations.c.id)
            .where(operations.c.request_id == request_id)
        )
        if row is None or (row.finished_at is not None and row.body is None):
            return None
        return stored_outcome(row, None if row.finished_at is None else to_outcome(row))

    def mark_delivered(self, request_id: str) -> Future[None]:
        """Record that the client got the result: after the first time it is kept ``DELIVERED_S`` longer."""
        now = time.time()

        def write(connection: Connection) -> None:
            undelivered = and_(operations.c.request_id == request_id, operations.c.delivered_at.is_(None))
            connection.execute(update(operations).where(undelivered).values(delivered_at=now))

        return self._write(write)

    def unfinished(self, scope: str | None = None) -> list[Operation]:
        """Operations that have not ended, of one scope or all, in the order of scope and seq_id."""
        statement = with_payload().where(operations.c.finished_at.is_(None))
        if scope is not None:
            statement = statement.where(operations.c.scope == scope)
        rows = self._rows(statement.order_by(operations.c.scope, operations.c.seq_id))
        return [to_operation(row) for row in rows]

    def forget_session(self, session_id: str) -> Future[None]:
        """Delete a session, its models and samplers, and all operations of these. Runs keep their owner."""

        def write(connection: Connection) -> None:
            connection.execute(delete(sessions).where(sessions.c.session_id == session_id))
            # every scope begins with the session id and a colon; ";" is the character after it
            of_session = and_(operations.c.scope >= f"{session_id}:", operations.c.scope < f"{session_id};")
            connection.execute(delete(operations).where(of_session))
            self._queue.forget()

        return self._write(write)

    def prune(self, now: float) -> Future[int]:
        """Delete results that have expired at ``now``; returns how many. What a replay may need is kept: payloads, and
        what failed beside them."""

        def write(connection: Connection) -> int:
            expired = and_(
                operations.c.finished_at.is_not(None),
                or_(operations.c.delivered_at < now - DELIVERED_S, operations.c.finished_at < now - UNDELIVERED_S),
            )
            needed = select(payloads.c.operation).where(payloads.c.operation == operations.c.id).exists()
            ids = select(operations.c.id).where(expired, ~and_(operations.c.failed, needed))
            dropped = connection.execute(delete(results).where(results.c.operation.in_(ids))).rowcount
            connection.execute(delete(operations).where(expired, ~needed))
            give_back_space(connection)
            return dropped

        return self._write(write)

    def queued_by_kind(self) -> dict[str, int]:
        """How many operations have not ended, by kind."""
        waiting = select(operations.c.kind, func.count().label("n")).where(operations.c.finished_at.is_(None))
        return {row.kind: row.n for row in self._rows(waiting.group_by(operations.c.kind))}

    def _rolled_back(self) -> None:
        self._queue.forget()
