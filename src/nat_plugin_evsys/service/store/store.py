"""Everything the server must remember: sessions, models, samplers, operations and how they ended."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select

from nat_plugin_evsys.service.store.catalog import Catalog
from nat_plugin_evsys.service.store.operation_log import OperationLog
from nat_plugin_evsys.service.store.replay_log import ReplayLog
from nat_plugin_evsys.service.store.rows import ModelRow, SamplerRow, SessionRow, StoredOutcome
from nat_plugin_evsys.service.store.tables import models, samplers, sessions

__all__ = ["ModelRow", "SamplerRow", "SessionRow", "Store", "StoredOutcome"]


class Store(OperationLog, ReplayLog, Catalog):
    """The server's database. Safe to use from all threads of the one process that has it open.

    A writing method returns a ``concurrent.futures.Future`` that resolves once the write is committed, on the writer's
    thread, and fails with a ``StoreError`` unless the method names another error. A reading method returns committed
    data at once, and raises ``StoreError`` if the database cannot be read.

    Args:
        root: directory of the store; created if missing.
        max_queued_per_owner: bound on one owner's operations that have not ended.
        max_queued: the same, for all owners together.
        max_queued_bytes_per_owner: bound on the bytes of one owner's, beyond which no more are taken.

    Raises:
        ConfigError: another server has the store open, or it was written by a newer version of this package.
    """

    def counts(self) -> dict[str, Any]:
        """``sessions``, ``models`` and ``samplers`` (how many), and ``queued``: operations not ended, by kind."""
        sizes = {table.name: self._rows(select(func.count()).select_from(table))[0][0] for table in _COUNTED}
        return {**sizes, "queued": self.queued_by_kind()}


_COUNTED = (sessions, models, samplers)
