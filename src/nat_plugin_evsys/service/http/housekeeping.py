"""The server's background work: parks idle sessions, forgets old ones, deletes expired checkpoints."""

from __future__ import annotations

import asyncio
import logging
import time

from nat_plugin_evsys.errors import EvsysError
from nat_plugin_evsys.service.http.context import ServiceContext

logger = logging.getLogger(__name__)

_EXPIRE_EVERY = 600.0  # seconds; a checkpoint whose time is up is also deleted when somebody looks at it


class Housekeeping:
    """Checks everything every ``housekeeping_seconds``."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._parked: dict[str, float] = {}
        self._expired_at = float("-inf")

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.once, time.time())
            except EvsysError as error:
                logger.error("housekeeping failed and will be retried: %s", error)
            except Exception:  # the boundary of a background task: logged, and tried again
                logger.exception("housekeeping failed and will be retried")
            await asyncio.sleep(self._context.config.housekeeping_seconds)

    def once(self, now: float) -> None:
        """Check once. Blocks: not for the event loop."""
        context, config = self._context, self._context.config
        for session in context.store.sessions(unseen_since=now - config.session_timeout):
            if session.last_seen < now - config.session_ttl:
                context.engine.forget_session(session.session_id)
                context.store.forget_session(session.session_id).result()
                context.presence.forget(session.session_id)
                self._parked.pop(session.session_id, None)
                logger.info("session forgotten", extra={"fields": {"session": session.session_id}})
            elif self._parked.get(session.session_id) != session.last_seen:
                context.engine.park_session(session.session_id)
                self._parked[session.session_id] = session.last_seen
                logger.info("idle session parked", extra={"fields": {"session": session.session_id}})
        context.store.prune(now).result()
        if time.monotonic() - self._expired_at >= _EXPIRE_EVERY:
            self._expired_at = time.monotonic()
            context.catalog.expire()
