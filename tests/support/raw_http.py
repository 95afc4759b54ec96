"""Raw sockets against an HTTP server: what no client library would send."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx


def connect(url: str, timeout: float = 30.0) -> socket.socket:
    """A connection to the server at ``url``."""
    place = httpx.URL(url)
    return socket.create_connection((place.host, place.port or 80), timeout=timeout)


def send(connection: socket.socket, data: bytes, pieces: int = 1 << 16) -> int:
    """Send until all is sent or the server has closed; how many bytes it took."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < len(data):
            sent += connection.send(data[sent : sent + pieces])
    return sent


def answer(connection: socket.socket) -> bytes:
    """What the server says until it closes; nothing where it closed without a word."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            said += piece
    return said


def closes_within(connection: socket.socket, seconds: float) -> bool:
    """Whether the server ends the connection by then."""
    connection.settimeout(seconds)
    try:
        answer(connection)
    except TimeoutError:
        return False
    return True


@dataclass
class Watch:
    """How long a server took to answer a simple request, again and again."""

    seconds: list[float] = field(default_factory=list)

    @property
    def slowest(self) -> float:
        """Of all answers."""
        return max(self.seconds)


@contextlib.contextmanager
def watching(url: str, every: float = 0.02) -> Iterator[Watch]:
    """Ask ``url`` all the while, at least once, from a thread of its own, on a connection for each request."""
    watch, ended = Watch(), threading.Event()

    def ask() -> None:
        while True:
            started = time.perf_counter()
            httpx.get(url, timeout=60).raise_for_status()
            watch.seconds.append(time.perf_counter() - started)
            if ended.wait(every):
                return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join(70)
