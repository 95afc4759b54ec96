"""Bounds of what comes in: bodies, JSON, page sizes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import zstandard
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from nat_plugin_evsys.service.http.refusals import Refusal, bad_request

M = TypeVar("M", bound=BaseModel)

MAX_SEQ_ID = 2**63 - 1  # what a column of the store holds
MAX_PAGE = 1000
_BODY_SECONDS = 120.0
_OFF_LOOP_BYTES = 1 << 18  # from here on, decoding would hold up the other requests noticeably


@dataclass(frozen=True)
class BodyLimits:
    """Most bytes of a body, as sent and decompressed."""

    sent: int
    decompressed: int


class Gone(Exception):
    """The client closed the connection before its request was read."""


async def read_body(request: Request, limits: BodyLimits) -> bytes:
    """The request's body, decompressed where ``Content-Encoding`` is zstd.

    Raises:
        Refusal: 413 too large, 415 another encoding, 400 broken zstd, 408 not sent within two minutes.
        Gone: the client went away.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "zstd"):
        raise Refusal(415, f"Content-Encoding {encoding[:40]!r} is not taken; send the body plain or as zstd")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.sent:
        raise _too_large("body", limits.sent)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.sent:
                    raise _too_large("body", limits.sent)
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise Gone from error
    if encoding != "zstd":
        return bytes(body)
    if len(body) < _OFF_LOOP_BYTES:
        return decompress(bytes(body), limits.decompressed)
    return await asyncio.to_thread(decompress, bytes(body), limits.decompressed)


def decompress(data: bytes, limit: int) -> bytes:
    """zstd frames -> at most ``limit`` bytes; what is beyond is never unpacked.

    Raises:
        Refusal: 413 too large, 400 no zstd.
    """
    out = bytearray()
    try:
        # A frame may ask for a window as large as it likes; this bounds the memory for it.
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data, read_across_frames=True)
        while chunk := reader.read(1 << 20):
            out += chunk
            if len(out) > limit:
                raise _too_large("decompressed body", limit)
    except (zstandard.ZstdError, MemoryError) as error:
        raise bad_request(f"the body is not zstd, as its Content-Encoding says: {error}") from error
    return bytes(out)


def _too_large(what: str, limit: int) -> Refusal:
    return Refusal(413, f"the {what} has more than {limit} bytes; send fewer Datums in one request")


async def read_json(request: Request, limits: BodyLimits) -> tuple[bytes, dict[str, Any]]:
    """A body and the JSON object in it; raises what ``read_body`` and ``parse_json`` raise."""
    body = await read_body(request, limits)
    if len(body) < _OFF_LOOP_BYTES:
        return body, parse_json(body)
    return body, await asyncio.to_thread(parse_json, body)


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        Refusal: 400 where it is none, is nested too deeply, or has text that is no Unicode.
    """
    try:
        value = json.loads(body or b"{}", parse_constant=_refuse_constant)
        if b"\\u" in body or b"\\U" in body:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates
    except RecursionError as error:
        raise bad_request("the body's JSON is nested too deeply") from error
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def parse_as(model: type[M], value: dict[str, Any]) -> M:
    """The fields of ``model`` in a JSON object; unknown ones (of a newer SDK) are left out.

    Raises:
        Refusal: 400 that names the first wrong field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bad_request(f"`{where}`: {first['msg']}" if where else first["msg"]) from error


def page_of(request: Request, default: int) -> tuple[int, int]:
    """``(limit, offset)`` of a listing.

    Raises:
        Refusal: 400 for anything but whole numbers in range.
    """
    limit = _whole(request, "limit", default)
    offset = _whole(request, "offset", 0)
    if limit < 1:
        raise bad_request("limit must be at least 1")
    return min(limit, MAX_PAGE), offset


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 15:
        raise bad_request(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)
