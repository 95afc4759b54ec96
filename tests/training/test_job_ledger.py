import json
import logging
import multiprocessing
from pathlib import Path

import pytest

from nat_plugin_evsys.json_lines import append_json_lines, read_json_lines
from nat_plugin_evsys.training.job_ledger import JobLedger


def test_records_come_back_in_order(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path / "run")
    assert ledger.read() == []
    ledger.submitted("a", "run", calls=3)
    ledger.finished("a", "run", status="completed")
    assert [(r["event"], r["job_id"], r["run_id"]) for r in ledger.read()] == [
        ("submitted", "a", "run"),
        ("finished", "a", "run"),
    ]
    assert (tmp_path / "run" / "jobs.jsonl").read_text().count("\n") == 2


def test_a_torn_last_line_spoils_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ledger = JobLedger(tmp_path)
    ledger.submitted("a", "run")
    with ledger.path.open("a") as file:
        file.write('{"event": "fini')
    with caplog.at_level(logging.WARNING):
        assert [r["job_id"] for r in ledger.read()] == ["a"]
    assert "line 2 is incomplete" in caplog.text
    ledger.submitted("b", "run")
    ledger.finished("b", "run")
    assert [r["job_id"] for r in ledger.read()] == ["a", "b", "b"]


def test_unfinished_epochs_leave_neither_jobs_nor_datums(tmp_path: Path) -> None:
    ledger = JobLedger(tmp_path)
    for epoch, job in enumerate("abc"):
        ledger.submitted(job, "run", epoch=epoch)
        ledger.finished(job, "run", status="completed")
        (tmp_path / f"datums-{job}.jsonl").touch()
    ledger.discard_after(2)
    assert [record["job_id"] for record in ledger.read()] == ["a", "a", "b", "b"]
    assert {path.name for path in tmp_path.glob("datums-*")} == {"datums-a.jsonl", "datums-b.jsonl"}
    ledger.discard_after(-1)
    assert ledger.read() == []


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_json_lines(path, [{"loss": float("nan"), "more": [float("inf"), 1.5], "deep": {"x": float("-inf")}}])
    line = path.read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "loss": None,
        "more": [None, 1.5],
        "deep": {"x": None},
        "non_finite": {"loss": "nan"},
    }


def _append(path: Path, name: int) -> None:
    for number in range(30):
        append_json_lines(path, [{"writer": name, "number": number, "filler": "x" * 3000}])


def test_concurrent_writers_tear_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, name)) for name in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    records = read_json_lines(path)
    assert len(records) == 90
    for name in range(3):
        assert [r["number"] for r in records if r["writer"] == name] == list(range(30))
