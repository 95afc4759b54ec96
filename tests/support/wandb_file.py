"""Reads the file that Weights & Biases writes offline: protobuf records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4
"""Kinds of a piece: a record is one whole piece, or a first, some in the middle (3), and a last one."""


def records(path: Path) -> Iterator[Any]:
    """Every ``wandb_internal_pb2.Record`` of a run's file, in order."""
    from wandb.proto import wandb_internal_pb2

    raw = path.read_bytes()
    assert raw[:4] == b":W&B", raw[:8]
    position, record = FILE_HEADER, b""
    while position + RECORD_HEADER.size <= len(raw):
        left = BLOCK - position % BLOCK
        if left < RECORD_HEADER.size:  # padding
            position += left
            continue
        _, length, kind = RECORD_HEADER.unpack_from(raw, position)
        position += RECORD_HEADER.size
        piece = raw[position : position + length]
        position += length
        if position > len(raw):  # it is being written
            return
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield wandb_internal_pb2.Record.FromString(record)


def finished_file(directory: Path, patience: float = 60.0) -> Path:
    """The file of an offline run, once its service process has written it to its end.

    Raises:
        TimeoutError: it has not, within ``patience`` seconds.
    """
    [path] = directory.glob("*.wandb")
    deadline = time.monotonic() + patience
    while exit_code(path) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} does not end; it has {path.stat().st_size} bytes")
        time.sleep(0.1)
    return path


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged, call by call."""
    rows = [record.history.item for record in records(path) if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def config(path: Path) -> dict[str, Any]:
    """The run's configuration."""
    found: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else ()
        found |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in updates}
    return found


def exit_code(path: Path) -> int | None:
    """The code that the run ended with; None for one that has not ended."""
    codes = [record.exit.exit_code for record in records(path) if record.WhichOneof("record_type") == "exit"]
    return codes[-1] if codes else None
