"""What a model is rebuilt from: its ended operations, and the saved states that cover the older ones."""

from __future__ import annotations

from concurrent.futures import Future

from sqlalchemy import Connection, delete, select, update

from nat_plugin_evsys.errors import StoreError
from nat_plugin_evsys.service.store.database import Database
from nat_plugin_evsys.service.store.operation_rows import to_operation, to_outcome, trained, with_payload
from nat_plugin_evsys.service.store.operations import Effect, Operation, Outcome
from nat_plugin_evsys.service.store.tables import models, operations, payloads, results


class ReplayLog(Database):
    """The part of ``Store`` from which models are restored."""

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

    def set_saved_state(self, model_id: str, directory: str, seq: int, *, retain: bool) -> Future[None]:
        """Record that the state in ``directory`` covers the model's operations up to ``seq``.

        Their payloads are dropped, unless ``retain``. The future fails with ``StoreError`` for an unknown model.
        """

        def write(connection: Connection) -> None:
            moved = update(models).where(models.c.model_id == model_id)
            if connection.execute(moved.values(saved_state=directory, saved_state_seq=seq)).rowcount == 0:
                raise StoreError(f"there is no model {model_id} whose state could be saved")
            if not retain:
                covered = select(operations.c.id).where(trained(model_id), operations.c.seq_id <= seq)
                connection.execute(delete(payloads).where(payloads.c.operation.in_(covered)))

        return self._write(write)
