"""Files of trajectories that NAT or others wrote: every entry is a record, and what cannot be read says so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.traces.files import read_records
from nat_plugin_evsys.rollouts.traces.record import Record
from nat_plugin_evsys.rollouts.traces.to_calls import CallReader

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


def step(kind: str, **fields: Any) -> dict[str, Any]:
    """An intermediate step of a run, as NAT's exporter writes it."""
    payload = {"UUID": kind[:3], "event_type": kind, **fields}
    return {"parent_id": None if kind.startswith("WORK") else "WOR", "function_ancestry": {}, "payload": payload}


def nat_row(*steps: Any, **fields: Any) -> dict[str, Any]:
    """A row of `nat eval`."""
    return {"question": "q", "answer": "a", "generated_answer": "b", "intermediate_steps": list(steps), **fields}


def batch(*attributes: Any) -> dict[str, Any]:
    """A batch of one span."""
    return {"resourceSpans": [{"scopeSpans": [{"spans": [{"spanId": "s", "attributes": list(attributes)}]}]}]}


RUN = {"key": "nat.event_type", "value": {"stringValue": "WORKFLOW_START"}}


@pytest.mark.parametrize(
    ("entry", "seen"),
    [
        ({"steps": ["x"], "agent": {}}, "'str' object has no attribute"),
        ({"steps": 5, "agent": {}}, "'int' object is not iterable"),
        (atif([1]), "TypeError"),
        (atif(extra="x"), "'str' object has no attribute"),
        (atif(metrics={"completion_token_ids": ["1"]}), "completion_token_ids are not integers"),
        (atif(metrics={"completion_token_ids": 7}), "'int' object is not iterable"),
        ({"trajectory": {"steps": [None]}}, "'NoneType' object has no attribute"),
        (nat_row("x"), "`intermediate_steps` is no list of intermediate steps"),
        ({"question": "q", "intermediate_steps": "x"}, "`intermediate_steps` is no list of intermediate steps"),
        (nat_row(step("LLM_START", data=[1]), step("LLM_END")), "'list' object has no attribute"),
        ({"question": "q"}, "KeyError: 'intermediate_steps'"),
        (step("LLM_START", UUID=["no", "text"]), "KeyError: 'intermediate_steps'"),
        (batch("x"), "string indices must be integers"),
        (batch(RUN, {"key": "nat.workflow.run_id", "value": {"arrayValue": {}}}), "the id of a span or of its run"),
        ({"resourceSpans": 5}, "'int' object is not iterable"),
        (5, "no JSON object"),
        (None, "no JSON object"),
    ],
)
def test_what_cannot_be_read_is_a_record_that_says_so(entry: Any, seen: str, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    whole, broken = read(path, atif(), entry)
    assert (whole.output, whole.problem, whole.error) == ("7", None, None)
    assert (broken.name, broken.problem) == (f"{path}, record 2", DropReason.UNREADABLE_RECORD)
    assert seen in str(broken.error)
    reader = CallReader(None, True, 1.0, frozenset())  # type: ignore[arg-type]  # there is nothing to render
    calls, reason, error = reader.calls(broken, "run")
    assert (calls, reason, error) == ([], DropReason.UNREADABLE_RECORD, broken.error)


def span(kind: str, run_id: str, **said: str) -> dict[str, Any]:
    """A span of a run, as NAT's exporter writes it."""
    of_nat = {f"nat.{name}": value for name, value in said.items()}
    attributes = {"nat.event_type": f"{kind}_START", "nat.workflow.run_id": run_id, "output.value": "7"} | of_nat
    listed = [{"key": key, "value": {"stringValue": value}} for key, value in attributes.items()]
    return {"spanId": f"{kind} of {run_id}", "attributes": listed}


def test_a_malformed_span_is_not_missed_by_its_own_run_alone(tmp_path: Path) -> None:
    said = json.dumps({"chat_inputs": [{"type": "human", "content": "How much?"}]})
    calls = [span("LLM", "whole", metadata=said), span("LLM", "lacking", metadata="[1]")]
    runs = [span("WORKFLOW", "whole"), span("WORKFLOW", "lacking")]
    lines = [{"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]} for spans in (runs, calls)]
    whole, lacking, broken = read(tmp_path / "otlp.jsonl", *lines)
    assert (whole.problem, len(whole.calls)) == (None, 1)
    assert (lacking.problem, broken.problem) == (DropReason.UNREADABLE_RECORD, DropReason.UNREADABLE_RECORD)
    assert f"a step of the run cannot be read ({broken.name}: no trajectory in a form" in str(lacking.error)


def test_a_malformed_line_is_not_missed_by_its_own_run_alone(tmp_path: Path) -> None:
    lost = step("LLM_END", UUID=["no", "text"]) | {"parent_id": "b"}
    whole, lacking, broken = read(tmp_path / "steps.jsonl", *run("a"), *run("b"), lost)
    assert whole.problem is None
    assert (lacking.problem, broken.problem) == (DropReason.UNREADABLE_RECORD, DropReason.UNREADABLE_RECORD)
    assert f"a step of the run cannot be read ({broken.name}:" in str(lacking.error)


def test_a_run_with_a_malformed_step_is_a_record_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    (broken,) = read(path, step("WORKFLOW_START", data="x"), step("WORKFLOW_END", data={"output": "7"}))
    assert (broken.name, broken.problem) == (f"{path}, run 1", DropReason.UNREADABLE_RECORD)
    assert "'str' object has no attribute 'get'" in str(broken.error)


def test_an_attribute_of_a_span_may_be_empty(tmp_path: Path) -> None:
    (run,) = read(tmp_path / "otlp.jsonl", batch(RUN, {"key": "input.value"}, {"key": "output.value", "value": {}}))
    assert run.problem is None


@pytest.mark.parametrize("data", [b"\xff\xfe[\x00]\x00", b"\x1f\x8b torn"])
def test_a_file_that_is_no_text_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("traces.json.gz" if data[:1] == b"\x1f" else "traces.json")
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path} cannot be read: .*write it as UTF-8"):
        read_records([path], KEYS, "files")


def run(run_id: str) -> list[dict[str, Any]]:
    """The steps of a run without calls."""
    started = step("WORKFLOW_START", metadata={"provided_metadata": {"workflow_run_id": run_id}})
    ended = step("WORKFLOW_END", data={"output": run_id})
    return [each | {"payload": each["payload"] | {"UUID": run_id}} for each in (started, ended)]


def note(run_id: Any, feedback: str) -> dict[str, Any]:
    return {"workflow_run_id": run_id, "feedback": feedback}


def written(path: Path, *entries: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, entries)))
    return path


def test_a_note_is_of_its_run_in_whichever_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [
        written(tmp_path / "notes.jsonl", note("b", "down"), note("row", "up")),
        written(tmp_path / "one.jsonl", *run("a")),
        written(tmp_path / "two.jsonl", note("a", "up"), *run("b"), *run("c"), nat_row(workflow_run_id="row")),
    ]
    found = read_records(files, KEYS, "files")
    assert [record.entry["workflow_run_id"] for record in found] == ["a", "b", "c", "row"]
    assert [record.entry.get("feedback") for record in found] == ["up", "down", None, "up"]
    assert found[-1].question == "q"
    assert not caplog.records


def test_notes_of_no_run_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    traces = written(tmp_path / "traces.jsonl", *run("a"), note("a", "up"), note("z", "up"), note(None, "up"), atif())
    assert [record.entry.get("feedback") for record in read_records([traces], KEYS, "files")] == ["up", None]
    (line,) = caplog.messages
    assert line.startswith(
        "2 of 3 lines that add to a run name a workflow_run_id that no trajectory of these files has"
    )
    assert "the first is 'z'" in line


def test_files_without_a_trajectory_are_named(tmp_path: Path) -> None:
    notes, empty = written(tmp_path / "notes.jsonl", note("a", "up")), written(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match=r"files: .*notes\.jsonl has no trajectory"):
        read_records([notes], KEYS, "files")
    with pytest.raises(DataError, match=r"files: .*empty\.jsonl has no trajectory"):
        read_records([written(tmp_path / "one.jsonl", *run("a")), empty], KEYS, "files")
