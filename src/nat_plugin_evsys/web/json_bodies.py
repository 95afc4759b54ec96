"""JSON bodies: size, number of values and depth are checked before any object is created."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from starlette.requests import Request

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.web.bodies import read_body

P = ParamSpec("P")
T = TypeVar("T")

_OFF_LOOP_BYTES = 1 << 16
_NO_NUMBERS = (b"NaN", b"Infinity", b"-Infinity")


@dataclass(frozen=True)
class JsonLimits:
    """Limits of a JSON body.

    Attributes:
        bytes: of it, as sent and decompressed.
        values: items of arrays and members of objects, all together.
        containers: arrays and objects, which take far more memory and time than their two characters.
        depth: nesting of arrays and objects.
    """

    bytes: int
    values: int
    containers: int
    depth: int = 64


SMALL = JsonLimits(bytes=1 << 20, values=50_000, containers=10_000)
"""Of bodies that carry names, numbers and metadata."""


async def read_json(request: Request, limits: JsonLimits = SMALL) -> tuple[bytes, dict[str, Any]]:
    """A body and the JSON object in it.

    Raises:
        Refusal: what ``read_body`` and ``parse_json`` raise.
        ClientGone: the client disconnected.
    """
    body = await read_body(request, limits.bytes)
    return body, await beside_loop(len(body), parse_json, body, limits)


async def beside_loop(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it, in a thread if handling ``size`` bytes would noticeably delay other requests."""
    if size < _OFF_LOOP_BYTES:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def parse_json(body: bytes, limits: JsonLimits = SMALL) -> dict[str, Any]:
    """The JSON object in a body; an empty body is an empty object.

    Raises:
        Refusal: 413 it has more than ``limits``; 400 it is not a JSON object, or is nested too deeply.
    """
    check_shape(body, limits)
    try:
        value = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is not JSON: {_said(body, error)}") from error
    if not isinstance(value, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def check_shape(body: bytes, limits: JsonLimits) -> None:
    """Count the objects that a body would become, without creating any.

    If it is not JSON, this covers the part before the error, which is all that a parser turns into objects.

    Raises:
        Refusal: 413 too many values or containers, 400 nested too deeply.
    """
    text = _outside_strings(body)
    opening = (text == ord("[")) | (text == ord("{"))
    closing = (text == ord("]")) | (text == ord("}"))
    brackets = opening[opening | closing][: 2 * limits.containers]  # a body that has more is refused for that
    levels = np.cumsum(np.where(brackets, 1, -1))
    if len(levels) and int(levels.max()) > limits.depth:
        raise Refusal(400, f"the body's JSON is nested too deeply; at most {limits.depth} levels are taken")
    if np.count_nonzero(text == ord(",")) > limits.values:
        raise Refusal(413, f"the body's JSON has more than {limits.values} values; send less at a time")
    if (count := np.count_nonzero(opening)) > limits.containers:
        raise Refusal(413, f"the body's JSON has {count} arrays and objects; at most {limits.containers} are taken")


def _outside_strings(body: bytes) -> npt.NDArray[np.uint8]:
    """The characters of JSON text that lie outside of its strings. Makes no Python object of any of them."""
    if b"\\" in body:  # pairs first, from the left: what is left of a run of them escapes what follows it
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    text = np.frombuffer(body, np.uint8)
    quotes = text == ord('"')
    inside = np.cumsum(quotes, dtype=np.uint8) & 1  # it wraps around, which leaves odd and even as they are
    outside: npt.NDArray[np.uint8] = text[(inside == 0) & ~quotes]
    return outside


def _said(body: bytes, error: orjson.JSONDecodeError) -> str:
    for name in _NO_NUMBERS:
        if body[error.pos :].startswith(name):
            return f"{name.decode()} is not a JSON number"
    return str(error)[:200]
