"""What all routes share, and how a handler becomes a route."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.errors import CheckpointError, ClientGone, EvsysError, Refusal
from nat_plugin_evsys.garbage import let_go
from nat_plugin_evsys.service.http.logs import OWNER, ROUTE
from nat_plugin_evsys.service.http.refusals import not_found, refusal_of, response_of
from nat_plugin_evsys.service.http.run_catalog import RunCatalog
from nat_plugin_evsys.service.work.access import CheckpointAccess

if TYPE_CHECKING:
    from nat_plugin_evsys.config.serve import ServeConfig
    from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
    from nat_plugin_evsys.service.http.auth import Keys
    from nat_plugin_evsys.service.http.pending import Pending
    from nat_plugin_evsys.service.http.presence import Presence
    from nat_plugin_evsys.service.http.prometheus import ServiceMetrics
    from nat_plugin_evsys.service.store.store import SamplerRow, SessionRow, Store
    from nat_plugin_evsys.service.work.engine import Engine

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

API = "/api/v1"

Handler = Callable[[Request, str], Awaitable[Response]]
"""``(request, owner) -> response``."""


@dataclass
class ServiceContext:
    """One running server.

    Attributes:
        closing: set when the server shuts down.
    """

    config: ServeConfig
    store: Store
    checkpoints: CheckpointStore
    engine: Engine
    keys: Keys
    pending: Pending
    presence: Presence
    metrics: ServiceMetrics
    closing: asyncio.Event
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @cached_property
    def access(self) -> CheckpointAccess:
        """Who may read which checkpoint."""
        return CheckpointAccess(self.store, self.checkpoints)

    @cached_property
    def catalog(self) -> RunCatalog:
        """Training runs and checkpoints."""
        return RunCatalog(self.store, self.checkpoints)

    def session(self, session_id: str, owner: str, *, for_work: bool = True) -> SessionRow:
        """A session of this owner, which this marks as active. Reads the store.

        Raises:
            Refusal: 404 there is none (or it is another key's); 400 it was finished and takes no more work.
        """
        row = self.store.session(session_id)
        if row is None or row.owner != owner:
            raise not_found(f"session {session_id[:64]!r}")
        if for_work and row.finished is not None:
            raise Refusal(400, f"session {session_id} was finished by its client ({row.finished}); create a new one")
        self.presence.seen(session_id)
        return row

    def sampler(self, sampler_id: str, owner: str) -> SamplerRow:
        """A sampling session of this owner. Reads the store.

        Raises:
            Refusal: 404 there is none, or it is another key's.
        """
        row = self.store.sampler(sampler_id)
        if row is None or row.owner != owner:
            raise not_found(f"sampling session {sampler_id[:64]!r}")
        return row

    async def read(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something that reads the store, off the event loop, since a slow disk would block everybody."""
        return await asyncio.wrap_future(self.store.reading(function, *args, **kwargs))

    async def written(self, write: Future[T]) -> T:
        """The result of a write to the store, once it is on disk."""
        return await asyncio.wrap_future(write)

    def park(self, session_id: str) -> None:
        """Unload the session's models, in the background."""
        task = asyncio.create_task(asyncio.to_thread(self.engine.park_session, session_id))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a session could not be parked", exc_info=error)

    def _shown(self, error: EvsysError) -> EvsysError:
        return self.access.public(error) if isinstance(error, CheckpointError) else error

    def route(self, method: str, path: str, handler: Handler, *, public: bool = False) -> Route:
        """A route that checks the key, and answers every exception with a JSON body.

        Args:
            public: needs no key.
        """

        async def endpoint(request: Request) -> Response:
            request.scope[ROUTE] = path
            try:
                owner = "" if public else self.keys.owner(request.headers)
                request.scope[OWNER] = owner or "-"
                return await handler(request, owner)
            except Exception as error:  # noqa: BLE001 - the boundary: answered, and logged if unforeseen
                answer = self._answer(error, f"{request.method} {path}")
                let_go(error)
                return answer

        return Route(path, endpoint, methods=[method])

    def _answer(self, error: Exception, where: str) -> Response:
        if isinstance(error, ClientGone):
            return Response(status_code=499)  # nobody reads it
        if isinstance(error, EvsysError):
            return response_of(refusal_of(self._shown(error)))
        logger.error("%s failed", where, exc_info=error)
        message = f"the server failed: {type(error).__name__}; its log has the rest"
        return response_of(Refusal(500, message, headers={"x-should-retry": "false"}))


def session_of(scope: str) -> str:
    """The session that a model id or sampling session id belongs to."""
    return scope.split(":", 1)[0]


def accepted(**facts: Any) -> JSONResponse:
    """A 200 with a JSON object; None values are left out."""
    return JSONResponse({name: value for name, value in facts.items() if value is not None})
