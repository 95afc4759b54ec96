"""Looks at a protobuf ``ForwardBackwardRequest`` without parsing it: whose it is, and whether parsing it is affordable.

A parsed message takes some 50 bytes for each field however small it was sent, so a few megabytes of empty fields would
fill the memory. The scan reads only tags and lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nat_plugin_evsys.errors import WireError

MAX_DATUMS = 1_000_000
"""Datums in one request; not less than the ``fwdbwd_max_chunk_len`` that clients are told."""

MAX_FIELDS = 4_000_000
"""Chunks, tensors and spans in one request."""

MAX_OTHERS = 10_000
"""Fields of a request beside its Datums: entries of the config, and what a newer SDK may add."""

# Field numbers of ForwardBackwardRequest, see proto/tinker_wire.proto.
_MODEL_ID, _SEQ_ID, _DATA, _FORWARD_ONLY = 1, 2, 3, 6

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_UINT64 = 2**64 - 1


def forward_backward_address(body: bytes) -> tuple[str, int]:
    """``(model_id, seq_id)`` of a serialized ``ForwardBackwardRequest``; its Datums are counted, not read.

    Raises:
        WireError: it is malformed, or has more than ``MAX_DATUMS`` Datums.
    """
    outline = _outline(body)
    try:
        return outline.model_id.decode("utf-8"), outline.seq_id
    except UnicodeDecodeError as exc:
        raise WireError("model_id is not UTF-8") from exc


def is_forward_only(body: bytes) -> bool:
    """Whether a serialized ``ForwardBackwardRequest`` leaves the gradient as it is.

    Raises:
        WireError: it is malformed.
    """
    return _outline(body).forward_only


def check_affordable(body: bytes) -> None:
    """Refuse a serialized ``ForwardBackwardRequest`` that would take far more memory than it has bytes.

    Raises:
        WireError: it is malformed, or has too many Datums or fields.
    """
    total = 0
    for index, (start, end) in enumerate(_outline(body).data):
        for _ in _fields(body, start, end, f"data[{index}]"):
            total += 1
            if total > MAX_FIELDS:
                raise WireError(f"data has more than {MAX_FIELDS} chunks and tensors; send fewer Datums at a time")


@dataclass
class _Outline:
    """The fields of a request except its Datums; ``data`` has their positions."""

    model_id: bytes = b""
    seq_id: int = 0
    forward_only: bool = False
    data: list[tuple[int, int]] = field(default_factory=list)


def _outline(body: bytes) -> _Outline:
    found, others = _Outline(), 0
    for number, kind, start, end in _fields(body, 0, len(body), "the request"):
        if number == _DATA and kind == _LEN:
            found.data.append((start, end))
            if len(found.data) > MAX_DATUMS:
                raise WireError(f"data has more than {MAX_DATUMS} Datums; send fewer at a time")
            continue
        others += 1
        if others > MAX_OTHERS:
            raise WireError(f"the request has more than {MAX_OTHERS} fields beside its data")
        if number == _MODEL_ID and kind == _LEN:
            found.model_id = body[start:end]
        elif number == _SEQ_ID and kind == _VARINT:
            low = _varint(body, start, end, "seq_id")[0] & 0xFFFFFFFF
            found.seq_id = low - 2**32 if low >= 2**31 else low
        elif number == _FORWARD_ONLY and kind == _VARINT:
            found.forward_only = _varint(body, start, end, "forward_only")[0] & _UINT64 != 0
    return found


def _fields(body: bytes, start: int, end: int, where: str) -> Iterator[tuple[int, int, int, int]]:
    """``(field number, wire type, start, end)`` of each field's value within ``body[start:end]``.

    Raises:
        WireError: it is not a sequence of fields.
    """
    while start < end:
        tag, start = _varint(body, start, end, where)
        kind = tag & 7
        if kind == _VARINT:
            following = _varint(body, start, end, where)[1]
        elif kind == _LEN:
            length, start = _varint(body, start, end, where)
            following = start + length
        elif kind in (_I64, _I32):
            following = start + (8 if kind == _I64 else 4)
        else:
            raise WireError(f"{where} has a field of wire type {kind}, which the protocol does not use")
        if following > end:
            raise WireError(f"{where} is cut off")
        yield tag >> 3, kind, start, following
        start = following


def _varint(body: bytes, start: int, end: int, where: str) -> tuple[int, int]:
    """The number at ``start``, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= end:
            raise WireError(f"{where} is cut off")
        byte = body[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
    raise WireError(f"{where} has a number of more than 10 bytes")
