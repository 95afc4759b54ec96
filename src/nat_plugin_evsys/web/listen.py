"""How every HTTP server here listens: same socket and HTTP settings, same shutdown."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.web.bounded_protocol import BoundedProtocol

# Longer than clients keep idle connections (httpx: 5 s), so that none is closed just as a request goes out on it.
_KEEP_ALIVE_SECONDS = 75
_GRACE_SECONDS = 5  # for responses in flight once the server is told to stop
_BACKLOG = 2048


def bind(host: str, port: int, *, advice: str) -> socket.socket:
    """A socket with this address; port 0 takes a free one. Nobody can connect before ``listen``.

    Args:
        advice: what to change when the address is taken, for the end of the error's message.

    Raises:
        ConfigError: it is taken, or does not belong to this machine.
    """
    address = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror or error}); {advice}") from error
    return listener


def url_of(host: str, port: int) -> str:
    """``http://host:port``, an IPv6 address in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(app: ASGIApp, listener: socket.socket, on_started: Callable[[], None]) -> HttpServer:
    """A server of ``app`` on a socket of ``bind``; it answers requests while its ``run`` is awaited.

    Args:
        on_started: called in the event loop as soon as requests are answered.

    Raises:
        ConfigError: another process has started to listen there since ``bind``.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); another process took it") from error
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        proxy_headers=False,  # they would let a client say from where it comes
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    return HttpServer(_Uvicorn(config, on_started), listener)


class HttpServer:
    """What ``listen`` returns."""

    def __init__(self, uvicorn_server: _Uvicorn, listener: socket.socket) -> None:
        self._server = uvicorn_server
        self._listener = listener

    async def run(self) -> None:
        """Answer requests until ``stop``; then finish those in flight and close the socket."""
        await self._server.serve(sockets=[self._listener])

    def stop(self, *, at_once: bool = False) -> None:
        """Accept no more requests; may be called from any thread, even before ``run``.

        Args:
            at_once: do not wait for responses in flight.
        """
        self._server.force_exit = at_once
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    """Tells when it has started, and leaves signals to its owner: uvicorn would raise them again at the end."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
