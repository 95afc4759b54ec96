"""JSON-lines files that survive a crash: one write per line, and a reader that tolerates a torn one."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
