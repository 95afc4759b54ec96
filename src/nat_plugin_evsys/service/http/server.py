"""The server process: from the settings to a listening socket, and to a clean shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from nat_plugin_evsys.config.serve import KEY_PREFIX, ServeConfig
from nat_plugin_evsys.engine.machine.allocator import share_heap
from nat_plugin_evsys.garbage import gc_frozen
from nat_plugin_evsys.service.http.app import create_app
from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.housekeeping import Housekeeping
from nat_plugin_evsys.service.http.logs import setup_logging
from nat_plugin_evsys.service.http.running import running
from nat_plugin_evsys.web.listen import HttpServer, bind, listen, url_of

logger = logging.getLogger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def serve(config: ServeConfig, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; unfinished work stays in the store and resumes at the next start.

    Args:
        announce: called with one line, containing the URL, once requests are answered.

    Raises:
        ConfigError: it cannot listen on the address, the store is another server's, or was written by a newer one.
        ModelError: a base model cannot be loaded.
    """
    setup_logging(config.log_format)
    share_heap()
    _raise_file_limit()
    os.umask(0o077)  # weights, requests and results are nobody else's business
    listener = bind(config.host, config.port, advice="choose another --port, or 0 for a free one")
    try:
        asyncio.run(_serve(config, listener, announce))
    finally:
        listener.close()


async def _serve(config: ServeConfig, listener: socket.socket, announce: Callable[[str], None]) -> None:
    closing = asyncio.Event()
    signals = _Signals(closing)
    try:
        async with running(config, closing) as context:
            if not closing.is_set():
                with gc_frozen():
                    await _answer_requests(context, listener, signals, announce)
    finally:
        signals.restore()
    logger.info("stopped")


async def _answer_requests(
    context: ServiceContext, listener: socket.socket, signals: _Signals, announce: Callable[[str], None]
) -> None:
    """Run until a signal comes."""
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
    """SIGTERM, SIGINT and SIGHUP end the server gracefully, a second one without waiting for responses in flight."""

    def __init__(self, closing: asyncio.Event) -> None:
        self._server: HttpServer | None = None
        self._closing = closing
        self._loop = asyncio.get_running_loop()
        # A signal that is ignored, as SIGHUP under nohup, stays ignored.
        self._numbers = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self._numbers:
            self._loop.add_signal_handler(number, self._end)

    def stops(self, server: HttpServer) -> None:
        """The server that a signal ends."""
        self._server = server

    def _end(self) -> None:
        if self._server is not None:
            self._server.stop(at_once=self._closing.is_set())
        self._closing.set()

    def restore(self) -> None:
        """Restore the signal handlers."""
        for number in self._numbers:
            self._loop.remove_signal_handler(number)


def _announcement(context: ServiceContext, listener: socket.socket) -> str:
    """The one line on stdout. It never has a key in it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)  # noqa: S104 - compared
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
