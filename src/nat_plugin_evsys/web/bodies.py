"""Request bodies, read and decompressed up to a limit."""

from __future__ import annotations

import asyncio

import zstandard
from starlette.requests import ClientDisconnect, Request

from nat_plugin_evsys.errors import ClientGone, Refusal

_MAX_WINDOW = 8 << 20  # RFC 9659: what a sender of zstd over HTTP may ask of the receiver's memory, at most
_PIECE = 1 << 20


async def read_body(request: Request, sent: int, decompressed: int | None = None) -> bytes:
    """The request's body, decompressed if ``Content-Encoding`` is zstd.

    Args:
        sent: most bytes as they are sent.
        decompressed: most bytes decompressed; default is ``sent``.

    Raises:
        Refusal: 413 too large, 415 another encoding, 400 broken zstd.
        ClientGone: the client disconnected, or took too long (``BoundedProtocol`` has answered it).
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "zstd"):
        raise Refusal(415, f"Content-Encoding {encoding[:40]!r} is not supported; send the body plain or as zstd")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > sent:
        raise _too_large("body", sent)
    pieces, size = list[bytes](), 0  # not one buffer that grows: it would leave holes of its size in the heap
    try:
        async for chunk in request.stream():
            pieces.append(chunk)
            size += len(chunk)
            if size > sent:
                raise _too_large("body", sent)
    except ClientDisconnect as error:
        raise ClientGone from error
    body = b"".join(pieces)
    if encoding != "zstd":
        return body
    # A few bytes may become many: off the event loop, whatever came.
    return await asyncio.to_thread(decompress, body, sent if decompressed is None else decompressed)


def decompress(data: bytes, limit: int) -> bytes:
    """Decompress zstd frames to at most ``limit`` bytes; the rest is never unpacked.

    Raises:
        Refusal: 413 too large, 400 not zstd.
    """
    pieces, size = list[bytes](), 0
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data, read_across_frames=True)
        while chunk := reader.read(_PIECE):
            pieces.append(chunk)
            size += len(chunk)
            if size > limit:
                raise _too_large("decompressed body", limit)
    except (zstandard.ZstdError, MemoryError) as error:
        raise Refusal(400, f"the body is not zstd, as its Content-Encoding says: {error}") from error
    return b"".join(pieces)


def _too_large(what: str, limit: int) -> Refusal:
    return Refusal(413, f"the {what} has more than {limit} bytes, the most that are taken here; send less at a time")
