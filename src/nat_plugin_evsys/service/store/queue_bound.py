"""How many operations may wait: of one owner, and in all; and how many bytes of one owner's."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import Connection, func, select

from nat_plugin_evsys.service.store.tables import operations, payloads


class QueueBound:
    """Counts the operations that have not ended, and their payloads' bytes. Used on the writer's thread only.

    Args:
        max_per_owner: operations of one owner.
        max_in_all: of all owners together.
        max_bytes_per_owner: of one owner's payloads, which are in memory until they have run.

    Attributes:
        waiting: how many of each owner; None until the first use, and after ``forget``.
        waiting_bytes: of their payloads.
    """

    def __init__(self, max_per_owner: int, max_in_all: int, max_bytes_per_owner: int) -> None:
        self._max_per_owner = max_per_owner
        self._max_in_all = max_in_all
        self._max_bytes_per_owner = max_bytes_per_owner
        self.waiting: Counter[str] | None = None
        self.waiting_bytes = Counter[str]()

    def full(self, connection: Connection, owner: str) -> str | None:
        """Why no more may be queued, or None if there is room."""
        waiting = self._count_all(connection) if self.waiting is None else self.waiting
        later = "send this one again later"
        if waiting[owner] >= self._max_per_owner:
            return f"{waiting[owner]} of your operations are already waiting; {later}"
        if self.waiting_bytes[owner] >= self._max_bytes_per_owner:
            return f"{self.waiting_bytes[owner]} bytes of your operations are already waiting; {later}"
        if (total := waiting.total()) >= self._max_in_all:
            return f"{total} operations are already waiting on this server; {later}"
        return None

    def queued(self, owner: str, size: int) -> None:
        """Count an operation of ``owner`` with a payload of ``size`` bytes."""
        self._change(owner, 1, size)

    def ended(self, owner: str, size: int) -> None:
        """Count one no more."""
        self._change(owner, -1, -size)

    def forget(self) -> None:
        """Recount at the next use: the database has changed otherwise."""
        self.waiting = None

    def _change(self, owner: str, count: int, size: int) -> None:
        if self.waiting is None:
            return
        self.waiting[owner] += count
        self.waiting_bytes[owner] += size
        if not self.waiting[owner]:
            del self.waiting[owner], self.waiting_bytes[owner]

    def _count_all(self, connection: Connection) -> Counter[str]:
        size = func.sum(func.length(payloads.c.body)).label("size")
        waiting = select(operations.c.owner, func.count().label("n"), size).join(payloads)
        rows = connection.execute(waiting.where(operations.c.finished_at.is_(None)).group_by(operations.c.owner)).all()
        self.waiting_bytes = Counter({row.owner: row.size for row in rows})
        self.waiting = Counter({row.owner: row.n for row in rows})
        return self.waiting
