"""Request bodies, read and decompressed up to a limit."""

from __future__ import annotations

import asyncio

import zstandard
from starlette.requests import ClientDisconnect, Request

from nat_plugin_evsys.errors import ClientGone, Refusal

_MAX_WINDOW = 8 << 20  # RFC 9659: what a sender of zstd over HTTP may ask of the receiver's memory, at most
_PIECE = 1 << 20
_MAX_HEADER = 18  # bytes of a zstd frame's
_MAX_PARTS = 100_000  # a block has up to 128 KiB of content, and one without any takes three bytes
_SKIPPABLE = b"\x2a\x4d\x18"


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
        Refusal: 413 too large, 400 not zstd, or cut off.
    """
    pieces, size = list[bytes](), 0
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(data, read_across_frames=True)
        while chunk := reader.read(_PIECE):
            pieces.append(chunk)
            size += len(chunk)
            if size > limit:
                raise _too_large("decompressed body", limit)
        if not _is_whole(data):
            raise Refusal(400, "the zstd body is cut off before its last frame ends; send all of it")
    except (zstandard.ZstdError, MemoryError) as error:
        raise Refusal(400, f"the body is not zstd, as its Content-Encoding says: {error}") from error
    return b"".join(pieces)


def _is_whole(data: bytes) -> bool:
    """Whether the last frame of ``data``, which can be decompressed, ends (RFC 8878, 3.1): the decompressor takes what
    is there of one that is cut off."""
    at = parts = 0
    checksum, inside = 0, False
    while at < len(data) or inside:
        parts += 1
        if parts > _MAX_PARTS:
            raise Refusal(400, f"the zstd body has more than {_MAX_PARTS} frames and blocks; make them larger")
        if inside:
            block = int.from_bytes(data[at : at + 3], "little")
            last, repeated, size = block & 1, (block >> 1) & 3 == 1, block >> 3
            inside = not last
            at += 3 + (1 if repeated else size) + (checksum if last else 0)
        elif data[at + 1 : at + 4] == _SKIPPABLE:
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        else:
            head = data[at : at + _MAX_HEADER]
            try:
                checksum = 4 if zstandard.get_frame_parameters(head).has_checksum else 0
                at, inside = at + zstandard.frame_header_size(head), True
            except zstandard.ZstdError:
                return False
        if at > len(data):
            return False
    return True


def _too_large(what: str, limit: int) -> Refusal:
    return Refusal(413, f"the {what} has more than {limit} bytes, the most that are taken here; send less at a time")
