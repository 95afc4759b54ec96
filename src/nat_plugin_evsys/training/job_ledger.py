"""``jobs.jsonl``: the outcome of every training job of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nat_plugin_evsys.json_lines import append_json_lines, read_json_lines


class JobLedger:
    """A ``submitted`` and a ``finished`` record for every training job of a run directory."""

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
