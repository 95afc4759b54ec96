"""``jobs.jsonl``: the outcome of every training job of a run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import append_json_lines, json_line, read_json_lines


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

    def discard_after(self, epochs_done: int) -> None:
        """Drop the jobs of unfinished epochs, and their Datums, so that a resumed run lists each job once."""
        records = self.read()
        dropped = {record["job_id"] for record in records if (record.get("epoch") or 0) >= max(0, epochs_done)}
        if dropped:
            kept = [record for record in records if record["job_id"] not in dropped]
            atomic_write(self.path, "".join(map(json_line, kept)))
            for job_id in dropped:
                (self.path.parent / f"datums-{job_id}.jsonl").unlink(missing_ok=True)

    def _append(self, event: str, job_id: str, run_id: str, fields: dict[str, Any]) -> None:
        record = {"event": event, "job_id": job_id, "run_id": run_id, "time": time.time(), **fields}
        append_json_lines(self.path, [record])
