"""JSON that every reader accepts, and logs of it: one record a line, never more torn than in the last one.

JSON has no NaN and no infinity, so a number that is not finite is written as ``null``. In a log, a record's own fields
that are ``null`` for that reason are named in its ``non_finite``, with what they were: ``{"loss": null, "non_finite":
{"loss": "nan"}}``. A crash can leave nothing worse than a torn last line: readers leave it out, the next writer removes
it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import math
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from io import FileIO
from pathlib import Path
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.files import naming

logger = logging.getLogger(__name__)

_LINE_ENDS = {end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text of ``value``; see ``jsonable``."""
    return escape_line_ends(json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False))


def escape_line_ends(text: str) -> str:
    """The same JSON, in which `str.splitlines` finds no line that is none.

    JSON leaves U+0085, U+2028 and U+2029 as they are, and a model may sample them. Many read logs and server-sent
    events with `splitlines`.
    """
    for end, escaped in _LINE_ENDS.items():  # many times faster than str.translate
        text = text.replace(end, escaped)
    return text


def lines_of(text: str) -> list[str]:
    """The lines of somebody else's JSON lines, without blank ones: only a newline ends one (see `escape_line_ends`)."""
    return [line for line in text.split("\n") if line.strip()]


def read_text(path: Path) -> str:
    """The text of somebody else's file: UTF-8, with or without a byte-order mark, and packed by gzip if it ends in .gz.

    Raises:
        DataError: it is neither.
    """
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read: {error}; write it as UTF-8") from error


def jsonable(value: Any) -> Any:
    """``value`` in JSON's own types. Paths and enums become strings, NumPy and torch scalars numbers, sets lists.

    Raises:
        TypeError: a value of a type that has no JSON form.
    """
    if isinstance(value, Enum):
        return jsonable(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return [jsonable(item) for item in sorted(value, key=lambda item: (str(type(item)), item))]
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return jsonable(asdict(value))
    if _is_scalar(value):
        return jsonable(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _key(key: Any) -> str:
    plain = jsonable(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _is_scalar(value: Any) -> bool:
    """True for a scalar of NumPy or torch."""
    return hasattr(value, "item") and getattr(value, "ndim", None) == 0


def json_line(record: Mapping[str, Any]) -> str:
    """One record of a JSON-lines file, with its newline."""
    plain = {name: value.item() if _is_scalar(value) else value for name, value in record.items()}
    odd = {name: str(v) for name, v in plain.items() if isinstance(v, float) and not math.isfinite(v)}
    return to_json({**plain, "non_finite": odd} if odd else plain) + "\n"


def append_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records, which are on disk when this returns. Several processes may append to one file.

    Raises:
        TypeError: a value has no JSON form; nothing is written.
    """
    data = "".join(map(json_line, records)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "ab+", buffering=0) as file:
        _lock(file)
        _mend(file, path)
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records, oldest first. A torn last line is left out; a missing file has no records.

    Raises:
        DataError: a line that no crash explains is not a JSON object.
    """
    return JsonLinesReader(path).read()


class JsonLinesReader:
    """Reads a log again and again while it grows, and each of its lines once. Any thread may call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._forget(inode=None)

    def _forget(self, inode: int | None) -> None:
        self._inode = inode
        self._lines = self._bytes = 0
        self._newest = b""
        self._records: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """See ``read_json_lines``; the next call returns the same records again, which are nobody's to change."""
        with self._lock:
            if not self._path.exists():
                self._forget(inode=None)
                return []
            *whole, last = self._unread().split(b"\n")
            records = [record for at, line in enumerate(whole) if (record := self._record(at, line)) is not None]
            self._records += records
            self._lines += len(whole)
            self._bytes += sum(len(line) + 1 for line in whole)
            if whole:
                self._newest = whole[-1] + b"\n"
            ended = _parse(last)
            if ended is None and last:
                logger.warning("%s, line %d is incomplete and was skipped: %.80r", self._path, self._lines + 1, last)
            return [*self._records] if ended is None else [*self._records, ended]

    def _unread(self) -> bytes:
        with open(self._path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._bytes - len(self._newest))
            if inode != self._inode or file.read(len(self._newest)) != self._newest:  # it was replaced, or cut
                self._forget(inode)
                file.seek(0)
            return file.read()

    def _record(self, at: int, line: bytes) -> dict[str, Any] | None:
        record = _parse(line)
        if record is None and line.strip():
            number = self._lines + at + 1
            raise DataError(f"{self._path}:{number}: not a JSON object: {line[:80]!r}; remove the line, or the file")
        return record


def _mend(file: FileIO, path: Path) -> None:
    """End a torn last line: keep it if it is a whole record that only lacks its newline, else remove it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    *whole, torn = file.read().split(b"\n")
    if _parse(torn) is not None:
        file.write(b"\n")
        return
    logger.warning("%s, line %d is incomplete and was removed: %.80r", path, len(whole) + 1, torn)
    file.truncate(size - len(torn))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _lock(file: FileIO) -> None:
    """Keep other writers out until the file is closed, where the system and the disk have locks."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
