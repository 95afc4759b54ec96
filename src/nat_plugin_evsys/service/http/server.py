"""The server process: from the settings to a listening socket, and back to a clean end."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from nat_plugin_evsys.config.serve import KEY_PREFIX, ServeConfig
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.http.app import create_app
from nat_plugin_evsys.service.http.auth import Keys
from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.housekeeping import Housekeeping
from nat_plugin_evsys.service.http.logs import setup_logging
from nat_plugin_evsys.service.http.metrics import ServiceMetrics
from nat_plugin_evsys.service.http.pending import Pending
from nat_plugin_evsys.service.http.presence import Presence
from nat_plugin_evsys.service.store.store import Store
from nat_plugin_evsys.service.work.engine import Engine
from nat_plugin_evsys.web.listen import HttpServer, bind, listen, url_of

logger = logging.getLogger(__name__)


def serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; what is not done by then stays in the store and is taken up at the next start.

    Args:
        announce: told one line, with the URL, once requests are answered.

    Raises:
        ConfigError: the address cannot be listened on, the store is another server's, or was written by a newer one.
        ModelError: a base model cannot be loaded.
    """
    setup_logging(config.log_format)
    _raise_file_limit()
    listener = bind(config.host, config.port, advice="choose another --port, or 0 for a free one")
    try:
        asyncio.run(_serve(config, listener, announce))
    finally:
        listener.close()


async def _serve(config: ServeConfig, listener: socket.socket, announce: Callable[[str], None]) -> None:
    closing = asyncio.Event()
    signals = _Signals(closing)
    store = Store(config.store, max_queued_per_owner=config.max_queued_per_owner, max_queued=config.max_queued)
    try:
        metrics = ServiceMetrics()
        pending = Pending(store, metrics, config.poll_seconds)
        checkpoints = CheckpointStore(store.root / "checkpoints")
        engine = _engine(config, store, checkpoints)
        try:
            await asyncio.to_thread(engine.start)
            keys = Keys([key.get_secret_value() for key in config.api_keys])
            context = ServiceContext(
                config, store, checkpoints, engine, keys, pending, Presence(store), metrics, closing
            )
            if not closing.is_set():
                await _answer_requests(context, listener, signals, announce)
        finally:
            pending.close()
            logger.info("parking the models")
            await asyncio.to_thread(engine.close, config.shutdown_seconds)
    finally:
        await asyncio.to_thread(store.close)
        signals.restore()
    logger.info("stopped")


def _engine(config: ServeConfig, store: Store, checkpoints: CheckpointStore) -> Engine:
    return Engine(
        store,
        checkpoints,
        base_models=config.base_models,
        device=config.device,
        dtype=config.dtype,
        context_length=config.context_length,
        max_batch_size=config.max_batch_size,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        retain_operations=config.retain_operations,
    )


async def _answer_requests(
    context: ServiceContext, listener: socket.socket, signals: _Signals, announce: Callable[[str], None]
) -> None:
    """Until a signal comes."""
    server = listen(create_app(context), listener, lambda: announce(_announcement(context, listener)))
    signals.stops(server)
    housekeeping = asyncio.create_task(Housekeeping(context).run())
    polls = asyncio.create_task(_answer_polls(context))
    try:
        await server.run()
    finally:
        for task in (housekeeping, polls):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _answer_polls(context: ServiceContext) -> None:
    await context.closing.wait()
    logger.info("shutting down")
    context.pending.close()


class _Signals:
    """SIGTERM and SIGINT end the server gracefully, a second one without waiting for responses in flight."""

    def __init__(self, closing: asyncio.Event) -> None:
        self._server: HttpServer | None = None
        self._closing = closing
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end)

    def stops(self, server: HttpServer) -> None:
        """The server that a signal ends."""
        self._server = server

    def _end(self) -> None:
        if self._server is not None:
            self._server.stop(at_once=self._closing.is_set())
        self._closing.set()

    def restore(self) -> None:
        """Give the signals back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)


def _announcement(context: ServiceContext, listener: socket.socket) -> str:
    """The one line on stdout. It never has a key in it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    url = url_of(host, port)
    key = "<one of your keys>" if context.keys.required else f"{KEY_PREFIX}local"
    names = ", ".join(base.name for base in context.engine.base_models())
    return f"serving {names} at {url}  (export TINKER_BASE_URL={url} TINKER_API_KEY={key}; OpenAI at {url}/v1)"


def _raise_file_limit() -> None:
    """Each long poll is a connection, and one client may hold 2000."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
