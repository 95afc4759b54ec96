"""The store's sessions, models and samplers, whose a run is, and which checkpoints are published."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from sqlalchemy import Connection, Row, Table, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from nat_plugin_evsys.errors import StoreError
from nat_plugin_evsys.service.store.database import Database
from nat_plugin_evsys.service.store.rows import ModelRow, SamplerRow, SessionRow
from nat_plugin_evsys.service.store.tables import models, published, runs, samplers, sessions

RowT = TypeVar("RowT", SessionRow, ModelRow, SamplerRow)


class Catalog(Database):
    """The part of ``Store`` with sessions, models, samplers and owners."""

    # Sessions

    def add_session(self, row: SessionRow) -> Future[None]:
        """Keep a new session."""
        return self._write(lambda connection: _insert(connection, sessions, row))

    def session(self, session_id: str) -> SessionRow | None:
        """One session, or None."""
        return self._one(SessionRow, sessions, session_id=session_id)

    def sessions(self, owner: str | None = None, unseen_since: float | None = None) -> list[SessionRow]:
        """All sessions, oldest first: of one owner, or last seen before ``unseen_since`` (seconds since the epoch)."""
        statement = select(sessions).order_by(sessions.c.created_at)
        if owner is not None:
            statement = statement.where(sessions.c.owner == owner)
        if unseen_since is not None:
            statement = statement.where(sessions.c.last_seen < unseen_since)
        return [SessionRow(**row._mapping) for row in self._rows(statement)]

    def touch_session(self, session_id: str, at: float) -> Future[None]:
        """Record when the client was last active. A session forgotten meanwhile stays forgotten."""
        seen = func.max(sessions.c.last_seen, at)
        return self._execute(update(sessions).where(sessions.c.session_id == session_id).values(last_seen=seen))

    def finish_session(self, session_id: str, reason: str) -> Future[None]:
        """Record that the client ended the session, and why."""
        return self._execute(update(sessions).where(sessions.c.session_id == session_id).values(finished=reason))

    # Models

    def add_model(self, row: ModelRow) -> Future[None]:
        """Keep a new model of a known session, and its run's owner. A known model is not changed."""

        def write(connection: Connection) -> None:
            owner = connection.execute(select(runs.c.owner).where(runs.c.model_id == row.model_id)).scalar()
            if owner not in (None, row.owner):
                raise StoreError(f"model {row.model_id} belongs to another owner")
            connection.execute(insert(models).values(**asdict(row)).on_conflict_do_nothing())
            if owner is None:
                connection.execute(insert(runs).values(model_id=row.model_id, owner=row.owner))

        return self._write(write)

    def model(self, model_id: str) -> ModelRow | None:
        """One model, or None."""
        return self._one(ModelRow, models, model_id=model_id)

    def models(self, owner: str | None = None, session_id: str | None = None) -> list[ModelRow]:
        """All models, oldest first: of one owner, of one session."""
        return self._many(ModelRow, models, owner=owner, session_id=session_id)

    def run_owner(self, model_id: str) -> str | None:
        """The owner of a model's checkpoints, even after its session was forgotten; None if unknown."""
        row = self._row(select(runs.c.owner).where(runs.c.model_id == model_id))
        return None if row is None else row.owner

    # Samplers

    def add_sampler(self, row: SamplerRow) -> Future[SamplerRow]:
        """Keep a sampler of a known session; a known sampler is not changed. Returns the kept one."""

        def write(connection: Connection) -> SamplerRow:
            connection.execute(insert(samplers).values(**asdict(row)).on_conflict_do_nothing())
            kept = connection.execute(select(samplers).where(samplers.c.sampler_id == row.sampler_id)).one()
            return SamplerRow(**kept._mapping)

        return self._write(write)

    def sampler(self, sampler_id: str) -> SamplerRow | None:
        """One sampler, or None."""
        return self._one(SamplerRow, samplers, sampler_id=sampler_id)

    def samplers(
        self, owner: str | None = None, model_id: str | None = None, session_id: str | None = None
    ) -> list[SamplerRow]:
        """All samplers, oldest first: of one owner, of one model's weights, of one session."""
        return self._many(SamplerRow, samplers, owner=owner, model_id=model_id, session_id=session_id)

    def drop_sampler(self, sampler_id: str) -> Future[None]:
        """Record that its weights have been deleted."""
        return self._execute(update(samplers).where(samplers.c.sampler_id == sampler_id).values(dropped=True))

    # Published checkpoints

    def publish(self, path: str, owner: str) -> Future[None]:
        """Let everybody sample from and load the checkpoint at this ``tinker://`` path."""
        return self._execute(insert(published).values(path=path, owner=owner).on_conflict_do_nothing())

    def unpublish(self, path: str) -> Future[None]:
        """Let only its owner use it from now on."""
        return self._execute(delete(published).where(published.c.path == path))

    def is_published(self, path: str) -> bool:
        """Whether everybody may use it."""
        return self._row(select(published.c.path).where(published.c.path == path)) is not None

    def _execute(self, statement: Any) -> Future[None]:
        def write(connection: Connection) -> None:
            connection.execute(statement)

        return self._write(write)

    def _one(self, kind: type[RowT], table: Table, **where: str) -> RowT | None:
        row = self._row(select(table).filter_by(**where))
        return None if row is None else _read(kind, table, row)

    def _many(self, kind: type[RowT], table: Table, **where: str | None) -> list[RowT]:
        chosen = {name: value for name, value in where.items() if value is not None}
        statement = select(table).filter_by(**chosen).order_by(table.c.created_at)
        return [_read(kind, table, row) for row in self._rows(statement)]


def _read(kind: type[RowT], table: Table, row: Row[Any]) -> RowT:
    """A row's values by field name."""
    return kind(**{column.key: row._mapping[column] for column in table.columns})


def _insert(connection: Connection, table: Table, row: Any) -> None:
    connection.execute(insert(table).values(**asdict(row)))
