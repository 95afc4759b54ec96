"""How many operations may wait: of one owner, and in all."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, func, select

from nat_plugin_evsys.service.store.tables import operations


class QueueBound:
    """Counts the operations that have not ended. Used on the writer's thread only.

    Args:
        max_per_owner: of one owner.
        max_in_all: of all owners together.

    Attributes:
        waiting: how many of each owner; None until the first use, and after ``forget``.
    """

    def __init__(self, max_per_owner: int, max_in_all: int) -> None:
        self._max_per_owner = max_per_owner
        self._max_in_all = max_in_all
        self.waiting: Counter[str] | None = None

    def full(self, connection: Connection, owner: str) -> str | None:
        """Why no more may be queued, or None if there is room."""
        if self.waiting is None:
            waiting = select(operations.c.owner, func.count().label("n")).where(operations.c.finished_at.is_(None))
            rows = connection.execute(waiting.group_by(operations.c.owner))
            self.waiting = Counter({row.owner: row.n for row in rows})
        if self.waiting[owner] >= self._max_per_owner:
            return f"{self.waiting[owner]} of your operations are already waiting; send this one again later"
        if (total := self.waiting.total()) >= self._max_in_all:
            return f"{total} operations are already waiting on this server; send this one again later"
        return None

    def count(self, owner: str, change: int) -> None:
        """Count operations of ``owner`` that were queued or (negative) have ended."""
        if self.waiting is not None:
            self.waiting[owner] += change
            if not self.waiting[owner]:
                del self.waiting[owner]

    def forget(self) -> None:
        """Recount at the next use: the database has changed otherwise."""
        self.waiting = None
