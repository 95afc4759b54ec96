"""Files of trajectories that NAT or others wrote: every entry is a record, and what cannot be read says so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys.rollouts.traces.files import read_records
from nat_plugin_evsys.rollouts.traces.record import Record

KEYS = {name: name for name in ("question", "answer", "generated_answer", "intermediate_steps")}
LINE_ENDS = "a\x85\u2028\u2029b"
"""All that JSON leaves as it is and `str.splitlines` splits at."""


def atif(reply: Any = "7", **step: Any) -> dict[str, Any]:
    """A conversation of one call."""
    steps = [{"source": "user", "message": "How much?"}, {"source": "agent", "message": reply, **step}]
    return {"agent": {"name": "a", "version": "1"}, "steps": steps}


def read(path: Path, *entries: Any) -> list[Record]:
    """The records of a file of JSON lines."""
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries), encoding="utf-8")
    return read_records([path], KEYS, "files")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_ends_at_a_newline_alone(suffix: str, mark: str, tmp_path: Path) -> None:
    text = mark + "\r\n".join(json.dumps(atif(reply), ensure_ascii=False) for reply in (LINE_ENDS, "7"))
    path = tmp_path / f"traces{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert [record.output for record in read_records([path], KEYS, "files")] == [LINE_ENDS, "7"]
