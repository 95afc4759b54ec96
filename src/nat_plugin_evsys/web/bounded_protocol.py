"""HTTP/1.1 with limits on what a client may send before a route sees its request, and on how long it may not read."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import cache
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""Of a request line and its headers; and of anything else that is no body, such as the trailers behind one."""

MAX_HEADERS = 100
"""Headers, and trailers, of one request."""

HEAD_SECONDS = 30.0
"""From the connection, or the first byte of a later request, to the end of its headers."""

BODY_SECONDS = 120.0
"""From the end of the headers to the end of the body."""

UNREAD_SECONDS = 120.0
"""For which a client may read nothing of an answer that waits for it."""

_WHY = {
    HTTPStatus.REQUEST_TIMEOUT: f"its headers took longer than {HEAD_SECONDS:g} s or its body {BODY_SECONDS:g} s",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"it has more than {MAX_HEADERS} headers or {MAX_HEAD_BYTES} bytes of "
    "them",
}

_OPENAI = (b"/v1/", b"/oai/api/v1/", b"/rollouts/")
"""Where the routes of ``policy.chat_routes`` are, on either server."""

_READ_BYTES = 16 << 10  # read at once: what is parsed in one go, while everybody else waits


class BoundedProtocol(HttpToolsProtocol, asyncio.BufferedProtocol):
    """uvicorn's protocol, which answers 431 and 408 if a request exceeds the limits, and closes the connection.

    A connection whose client does not read its answer is cut: to the application it is a client that went away.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._no_progress = 0  # bytes since something of a request was complete
        self._headers = 0
        self._parsed = False
        self._begun = False

    # -- what asyncio calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type] # as asyncio gives a Transport
        self._end_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_in(None)
        self._stop_watching()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(None)

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._parsed = False
        self._no_progress += nbytes
        self.data_received(bytes(self._buffer[:nbytes]))
        if self._no_progress > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif not self._parsed and self._deadline is None:
            self._end_in(HEAD_SECONDS)  # bytes that belong to no request stopped uvicorn's own timer

    # -- what the parser calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._parsed = self._begun = True
        self._headers = 0
        self._end_in(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise ValueError(f"more than {MAX_HEADERS} headers")  # the parser stops, and ``send_400_response`` answers
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._progress(BODY_SECONDS)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._parsed = True
        self._no_progress = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._progress(None)

    # -- bounds -----------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """The answer to what the parser rejected."""
        if self._headers > MAX_HEADERS:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            super().send_400_response(msg)

    def _progress(self, seconds: float | None) -> None:
        self._parsed = True
        self._no_progress = 0
        self._end_in(seconds)

    def _end_in(self, seconds: float | None) -> None:
        """Set the time limit for what the client sends now; None if nothing is expected."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._deadline = None
        if self._begun:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self.transport.close()

    def _watch_reader(self, before: int | None) -> None:
        """Look again after a while, and cut the connection if as many bytes wait for the client as ``before``."""
        waiting = self.transport.get_write_buffer_size()
        if before is not None and waiting >= before:
            logger.info("a client read nothing of its answer for %g s; its connection is cut", UNREAD_SECONDS)
            self.transport.abort()
            return
        self._unread = self.loop.call_later(UNREAD_SECONDS, self._watch_reader, waiting)

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer with a status, unless an answer is under way, and close the connection."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
            return
        message = _body(status, getattr(self, "url", b""))
        _say_once(status)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + f"content-length: {len(message)}\r\n\r\n".encode() + message)
        self.transport.close()


def _body(status: HTTPStatus, url: bytes) -> bytes:
    """The error as JSON: OpenAI's object where its routes are, elsewhere Tinker's."""
    if url.startswith(_OPENAI):
        error = {"message": f"{status.phrase}: {_WHY[status]}", "type": "invalid_request_error", "param": None}
        return json.dumps({"error": {**error, "code": status.name.lower()}}).encode()
    return json.dumps({"error": status.phrase, "category": "user"}).encode()


@cache
def _say_once(status: HTTPStatus) -> None:
    logger.warning("a request was refused (%d): %s; later ones are not logged", status, _WHY[status])
