"""Files that are either whole or absent, and JSON that every reader accepts. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import math
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any


def atomic_write(path: Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data``: a reader, or a crash at any moment, sees the old file or the new one.

    Raises:
        OSError: the directory is missing or not writable; no temporary file is left behind.
    """
    raw = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide reports from a group
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename within ``path`` durable, where the system can sync a directory."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text of ``value``. A number that is not finite becomes ``null``, since JSON has no other word for it."""
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)


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
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return jsonable(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def _key(key: Any) -> str:
    plain = jsonable(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LEFTOVER_AGE_S = 3600.0


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on leaving the block it is fsynced and takes ``target``'s place.

    An existing ``target`` is swapped out in one step where the kernel can (Linux renameat2), so that at every moment
    one whole directory bears the name. When the block raises, the temporary is removed and ``target`` stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """``target`` becomes the new directory and ``new`` holds the old one."""
    if _exchange(new, target):
        return
    # Without renameat2 the name is unused for a moment; the old directory lies beside it under a name that says so.
    aside = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:12]}"
    target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def replace_file(target: Path, text: str) -> None:
    """Write a file that is either the old one or, whole, the new one, whenever the process dies."""
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.write_text(text)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_directory(target: Path) -> None:
    """Delete a directory: its name is free at once, whenever the process dies."""
    dying = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:12]}"
    target.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def restore_set_aside(target: Path) -> None:
    """Bring back a directory that ``_swap`` had set aside when the process died between its two renames."""
    if target.exists():
        return
    for aside in sorted(target.parent.glob(f".{target.name}.old-*")):
        aside.rename(target)
        return


def _remove_leftovers(target: Path) -> None:
    """Delete temporaries of this name that a killed process left behind an hour ago or earlier."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


logger = logging.getLogger(__name__)


def append_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records, one JSON object per line, in a single write that is flushed to disk.

    A torn last line left by a crash is closed first, so that it spoils no record but itself. Numbers that JSON cannot
    hold are written as text ("nan", "inf").
    """
    text = "".join(json.dumps(_plain(record), default=str) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if _is_torn(descriptor):
            text = "\n" + text
        _write_all(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of a JSON-lines file; a torn line is skipped with a warning. A missing file has none."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s, line %d is torn and was skipped: %.80r", path, number, line)
    return records


class JobLedger:
    """``jobs.jsonl`` of a run directory: a ``submitted`` and a ``finished`` record for every training job."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "jobs.jsonl"

    def submitted(self, job_id: str, run_id: str, **fields: Any) -> None:
        """Record that a job was accepted."""
        self._append("submitted", job_id, run_id, fields)

    def finished(self, job_id: str, run_id: str, **fields: Any) -> None:
        """Record how a job ended."""
        self._append("finished", job_id, run_id, fields)

    def read(self) -> list[dict[str, Any]]:
        """All records, in the order in which they were written."""
        return read_json_lines(self.path)

    def _append(self, event: str, job_id: str, run_id: str, fields: dict[str, Any]) -> None:
        record = {"event": event, "job_id": job_id, "run_id": run_id, "time": time.time(), **fields}
        append_json_lines(self.path, [record])


def _is_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
