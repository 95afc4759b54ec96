"""When each session was last active, without a write per request."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store

logger = logging.getLogger(__name__)

_WRITE_EVERY = 5.0  # seconds; timeouts are minutes


class Presence:
    """Refreshes ``last_seen`` of sessions, each at most every five seconds. Safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._written: dict[str, float] = {}

    def seen(self, session_id: str) -> None:
        """Record that the session's client sent something."""
        now = time.monotonic()
        with self._lock:
            if now - self._written.get(session_id, float("-inf")) < _WRITE_EVERY:
                return
            self._written[session_id] = now
        self._store.touch_session(session_id, time.time())

    def forget(self, session_id: str) -> None:
        """Forget the session."""
        with self._lock:
            self._written.pop(session_id, None)
