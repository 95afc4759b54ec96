"""The store's operations: the journal from which a killed server comes back to where it was."""

from __future__ import annotations

import time
from collections import Counter
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
    refuse_second_end,
    same_operation,
    to_operation,
    to_outcome,
    trained,
    with_payload,
)
from nat_plugin_evsys.service.store.operations import Effect, Operation, OperationKind, Outcome
from nat_plugin_evsys.service.store.rows import StoredOutcome
from nat_plugin_evsys.service.store.tables import SAMPLE, models, operations, payloads, results, sessions

DELIVERED_S = 3600.0
"""How long a result is kept after it was first delivered."""

UNDELIVERED_S = 24 * 3600.0
"""How long a result is kept that nobody asked for."""


class OperationLog(Database):
    """The part of ``Store`` that keeps operations and how they ended."""

    def __init__(self, root: Path, *, max_queued_per_owner: int = 4096, max_queued: int = 16384) -> None:
        self._max_queued_per_owner = max_queued_per_owner
        self._max_queued = max_queued
        self._queued: Counter[str] | None = None  # not ended, by owner; the writer's thread reads it when it is None
        super().__init__(Path(root))

    def add_operation(self, operation: Operation) -> Future[tuple[str, bool]]:
        """Keep a new operation: its request id and True. Of one that its scope and seq_id tell is known: (id, False).

        The future fails with ``QueueFullError`` when as many wait as may, and with ``StoreError`` when the scope and
        seq_id are another owner's.
        """

        def write(connection: Connection) -> tuple[str, bool]:
            full = self._full(connection, operation.owner)
            if full is None and insert_operation(connection, operation):
                self._count(operation.owner, 1)
                return operation.request_id, True
            known = connection.execute(same_operation(operation)).first()
            if known is None:
                raise QueueFullError(full)
            if known.owner != operation.owner:
                raise StoreError(f"operation {operation.seq_id} of {operation.scope} belongs to another owner")
            return known.request_id, False

        return self._write(write)

    def finish_operation(self, request_id: str, outcome: Outcome, *, next_seq: int | None = None) -> Future[None]:
        """Keep how an operation ended and, in the same commit, which of its model's operations is next.

        An operation ends once: a later outcome is dropped, and logged. The future fails with ``StoreError`` when the
        request is unknown (its session was forgotten).
        """

        def write(connection: Connection) -> None:
            ended = end_operation(connection, request_id, outcome)
            if ended is None:
                refuse_second_end(connection, request_id)
                return
            if ended.family == SAMPLE:
                drop_payload(connection, ended.id)
            if next_seq is not None:
                move_on(connection, ended.scope, next_seq)
            self._count(ended.owner, -1)

        return self._write(write)

    def outcome(self, request_id: str) -> StoredOutcome | None:
        """What is known of a request; None when it is unknown, or its result has expired."""
        row = self._row(
            select(operations, results.c.body)
            .outerjoin(results, results.c.operation == operations.c.id)
            .where(operations.c.request_id == request_id)
        )
        if row is None or (row.finished_at is not None and row.body is None):
            return None
        return StoredOutcome(
            request_id=row.request_id,
            owner=row.owner,
            kind=OperationKind(row.kind),
            scope=row.scope,
            seq_id=row.seq_id,
            created_at=row.created_at,
            outcome=None if row.finished_at is None else to_outcome(row),
            delivered_at=row.delivered_at,
        )

    def mark_delivered(self, request_id: str) -> Future[None]:
        """The client has got the result: from the first time on it is kept ``DELIVERED_S`` longer."""
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

    def to_replay(self, model_id: str, after_seq: int) -> list[tuple[Operation, Effect]]:
        """A model's ended operations with an effect, after ``after_seq``, in the order of seq_id.

        Raises:
            StoreError: one's payload has been dropped, so that the state cannot be rebuilt from ``after_seq``.
        """
        rows = self._rows(
            with_payload(isouter=True)
            .where(trained(model_id), operations.c.seq_id > after_seq, operations.c.effect != Effect.NONE)
            .order_by(operations.c.seq_id)
        )
        for row in rows:
            if row.payload is None:
                lost = f"the payload of its operation {row.seq_id} is gone"
                raise StoreError(f"the state of model {model_id} cannot be rebuilt: {lost}")
        return [(to_operation(row), Effect(row.effect)) for row in rows]

    def log(self, model_id: str) -> list[tuple[Operation, Outcome]]:
        """A model's ended operations of which payload and result are still kept, in the order of seq_id."""
        rows = self._rows(
            with_payload()
            .add_columns(results.c.body)
            .join(results, results.c.operation == operations.c.id)
            .where(trained(model_id))
            .order_by(operations.c.seq_id)
        )
        return [(to_operation(row), to_outcome(row)) for row in rows]

    def failures(self, model_id: str, after_seq: int) -> list[tuple[Operation, Outcome, float]]:
        """A model's failed operations after ``after_seq`` that are still kept, and when each ended (epoch seconds)."""
        rows = self._rows(
            with_payload()
            .add_columns(results.c.body)
            .join(results, results.c.operation == operations.c.id)
            .where(trained(model_id), operations.c.seq_id > after_seq, operations.c.failed)
            .order_by(operations.c.seq_id)
        )
        return [(to_operation(row), to_outcome(row), row.finished_at) for row in rows]

    def set_snapshot(self, model_id: str, directory: str, seq: int, *, retain: bool) -> Future[None]:
        """A snapshot in ``directory`` covers the model's operations up to ``seq``.

        Their payloads are dropped, unless ``retain``. The future fails with ``StoreError`` for an unknown model.
        """

        def write(connection: Connection) -> None:
            moved = update(models).where(models.c.model_id == model_id)
            if connection.execute(moved.values(snapshot=directory, snapshot_seq=seq)).rowcount == 0:
                raise StoreError(f"there is no model {model_id} to snapshot")
            if not retain:
                covered = select(operations.c.id).where(trained(model_id), operations.c.seq_id <= seq)
                connection.execute(delete(payloads).where(payloads.c.operation.in_(covered)))

        return self._write(write)

    def forget_session(self, session_id: str) -> Future[None]:
        """Delete a session, its models and samplers, and all operations of these. Runs keep their owner."""

        def write(connection: Connection) -> None:
            connection.execute(delete(sessions).where(sessions.c.session_id == session_id))
            # every scope begins with the session id and a colon; ";" is the character after it
            of_session = and_(operations.c.scope >= f"{session_id}:", operations.c.scope < f"{session_id};")
            connection.execute(delete(operations).where(of_session))
            self._queued = None

        return self._write(write)

    def prune(self, now: float) -> Future[int]:
        """Delete results that have expired at ``now``; how many. What a replay may need of an operation stays."""

        def write(connection: Connection) -> int:
            expired = and_(
                operations.c.finished_at.is_not(None),
                or_(operations.c.delivered_at < now - DELIVERED_S, operations.c.finished_at < now - UNDELIVERED_S),
            )
            ids = select(operations.c.id).where(expired)
            dropped = connection.execute(delete(results).where(results.c.operation.in_(ids))).rowcount
            needed = select(payloads.c.operation).where(payloads.c.operation == operations.c.id).exists()
            connection.execute(delete(operations).where(expired, ~needed))
            give_back_space(connection)
            return dropped

        return self._write(write)

    def queued_by_kind(self) -> dict[str, int]:
        """How many operations have not ended, by kind."""
        waiting = select(operations.c.kind, func.count().label("n")).where(operations.c.finished_at.is_(None))
        return {row.kind: row.n for row in self._rows(waiting.group_by(operations.c.kind))}

    def _full(self, connection: Connection, owner: str) -> str | None:
        """Why no more may be queued; None when there is room. On the writer's thread."""
        if self._queued is None:
            waiting = select(operations.c.owner, func.count().label("n")).where(operations.c.finished_at.is_(None))
            rows = connection.execute(waiting.group_by(operations.c.owner))
            self._queued = Counter({row.owner: row.n for row in rows})
        if self._queued[owner] >= self._max_queued_per_owner:
            return f"{self._queued[owner]} of your operations are waiting already; send this one again later"
        if (total := self._queued.total()) >= self._max_queued:
            return f"{total} operations are waiting on this server already; send this one again later"
        return None

    def _count(self, owner: str, change: int) -> None:
        if self._queued is not None:
            self._queued[owner] += change
            if not self._queued[owner]:
                del self._queued[owner]

    def _rolled_back(self) -> None:
        self._queued = None
