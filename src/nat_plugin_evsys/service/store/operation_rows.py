"""Operations and outcomes as rows of the store's tables, and back."""

from __future__ import annotations

import logging
import time
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from nat_plugin_evsys.errors import StoreError
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.store.rows import StoredOutcome
from nat_plugin_evsys.service.store.tables import TRAIN, family, models, operations, payloads, results
from nat_plugin_evsys.service.wire.kinds import OperationKind

logger = logging.getLogger(__name__)

# Built once: building a statement costs more than running it.
_INSERT = (
    insert(operations).on_conflict_do_nothing(index_elements=["family", "scope", "seq_id"]).returning(operations.c.id)
)
_INSERT_PAYLOAD = insert(payloads)
_INSERT_RESULT = insert(results)
_END = (
    update(operations)
    .where(operations.c.request_id == bindparam("request"), operations.c.finished_at.is_(None))
    .values({name: bindparam(name) for name in ("finished_at", "failed", "effect", "content_type")})
    .returning(operations)
)
_PAYLOAD_BYTES = select(func.length(payloads.c.body)).where(payloads.c.operation == bindparam("number"))
_DROP_PAYLOAD = delete(payloads).where(payloads.c.operation == bindparam("number"))
_MOVE_ON = (
    update(models)
    .where(models.c.model_id == bindparam("model"))
    .values(next_seq=func.max(models.c.next_seq, bindparam("next")))
)


def insert_operation(connection: Connection, operation: Operation) -> bool:
    """False, and nothing done: its family, scope and seq_id are taken."""
    values = {
        "request_id": operation.request_id,
        "owner": operation.owner,
        "kind": operation.kind.value,
        "family": family(operation.kind),
        "scope": operation.scope,
        "seq_id": operation.seq_id,
        "created_at": operation.created_at,
    }
    number = connection.execute(_INSERT, values).scalar()
    if number is None:
        return False
    connection.execute(_INSERT_PAYLOAD, {"operation": number, "body": operation.payload})
    return True


def same_operation(operation: Operation) -> Select[Any]:
    """The kept operation of the same family, scope and seq_id."""
    return select(operations.c.request_id, operations.c.owner).where(
        operations.c.family == family(operation.kind),
        operations.c.scope == operation.scope,
        operations.c.seq_id == operation.seq_id,
    )


def end_operation(connection: Connection, request_id: str, outcome: Outcome) -> Row[Any] | None:
    """Mark an operation as ended now, and keep its result; its row. None: it had ended before."""
    ended = connection.execute(
        _END,
        {
            "request": request_id,
            "finished_at": time.time(),
            "failed": outcome.failed,
            "effect": outcome.effect.value,
            "content_type": outcome.content_type,
        },
    ).first()
    if ended is not None:
        connection.execute(_INSERT_RESULT, {"operation": ended.id, "body": outcome.body})
    return ended


def payload_bytes(connection: Connection, number: int) -> int:
    """The size of the payload of the operation with this id."""
    return int(connection.execute(_PAYLOAD_BYTES, {"number": number}).scalar_one())


def drop_payload(connection: Connection, number: int) -> None:
    """Record that nobody will run the operation with this id again."""
    connection.execute(_DROP_PAYLOAD, {"number": number})


def move_on(connection: Connection, model_id: str, next_seq: int) -> None:
    """Record that all operations of a model before ``next_seq`` have ended."""
    connection.execute(_MOVE_ON, {"model": model_id, "next": next_seq})


def refuse_second_end(connection: Connection, request_id: str) -> None:
    """For a request that ``end_operation`` did not find open.

    Raises:
        StoreError: it is unknown.
    """
    known = connection.execute(select(operations.c.id).where(operations.c.request_id == request_id)).first()
    if known is None:
        raise StoreError(f"there is no request {request_id} to end")
    logger.warning("request %s has already ended; its second outcome is dropped", request_id)


def trained(model_id: str) -> Any:
    """Ended training operations of a model."""
    return and_(operations.c.family == TRAIN, operations.c.scope == model_id, operations.c.finished_at.is_not(None))


def with_payload(*, isouter: bool = False) -> Select[Any]:
    """Operations with ``payload``; ``isouter``: also those whose payload has been dropped."""
    statement = select(operations, payloads.c.body.label("payload"))
    return statement.join(payloads, payloads.c.operation == operations.c.id, isouter=isouter)


def to_operation(row: Row[Any]) -> Operation:
    """The operation of a row of ``with_payload``."""
    return Operation(
        request_id=row.request_id,
        owner=row.owner,
        kind=OperationKind(row.kind),
        scope=row.scope,
        seq_id=row.seq_id,
        payload=row.payload,
        created_at=row.created_at,
    )


def to_outcome(row: Row[Any]) -> Outcome:
    """The outcome of a row with the result's ``body``."""
    return Outcome(body=row.body, content_type=row.content_type, failed=row.failed, effect=Effect(row.effect))


def stored_outcome(row: Row[Any], outcome: Outcome | None) -> StoredOutcome:
    """The request's state from a row of ``operations``."""
    return StoredOutcome(
        request_id=row.request_id,
        owner=row.owner,
        kind=OperationKind(row.kind),
        scope=row.scope,
        seq_id=row.seq_id,
        created_at=row.created_at,
        outcome=outcome,
        delivered_at=row.delivered_at,
    )
