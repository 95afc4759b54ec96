"""Files of trajectories, told apart by what is in them.

- the lines of NAT's ``file`` telemetry exporter: one intermediate step each, of runs that went on at once;
- what an OpenTelemetry collector's ``file`` exporter writes of NAT's spans;
- ``workflow_output.json`` and ``workflow_output_atif.json`` of ``nat eval``;
- trajectories in ATIF, as an array, one in a line (also packed by gzip, as in ``rollouts/``), or one in a file;
- beside any steps, lines ``{"workflow_run_id": …, …}``, which add their fields (a feedback) to that run's record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.json_lines import lines_of, read_text
from nat_plugin_evsys.rollouts.traces.atif_records import record_of_atif
from nat_plugin_evsys.rollouts.traces.otlp import BATCH, steps_of_batches
from nat_plugin_evsys.rollouts.traces.record import Record
from nat_plugin_evsys.rollouts.traces.steps import is_step, read_calls, record_of_run, runs_of

RUN_ID = "workflow_run_id"


def read_records(paths: Sequence[Path], keys: Mapping[str, str], what: str) -> list[Record]:
    """The records of some files, in their order. What cannot be read is a record too, with its reason.

    Args:
        keys: the names of ``question``, ``answer``, ``generated_answer`` and ``intermediate_steps`` in a row of
            ``nat eval``.
        what: the setting that names the files.

    Raises:
        ConfigError: no such file.
        DataError: a file has no record.
    """
    return [record for path in paths for record in _records(path, keys, what)]


def _records(path: Path, keys: Mapping[str, str], what: str) -> list[Record]:
    if not path.is_file():
        raise ConfigError(no_file(what, path))
    steps: list[Mapping[str, Any]] = []
    batches: list[Mapping[str, Any]] = []
    notes: list[Mapping[str, Any]] = []
    records: list[Record] = []
    for number, entry in enumerate(_entries(path), start=1):
        name = f"{path}, record {number}"
        if not isinstance(entry, dict):
            records.append(Record(name, problem=DropReason.UNREADABLE_RECORD))
        elif is_step(entry):
            steps.append(entry)
        elif BATCH in entry:
            batches.append(entry)
        elif RUN_ID in entry:
            notes.append(entry)
        else:
            records.append(_record(entry, keys, name))
    steps += steps_of_batches(batches)
    runs = [record_of_run(run, f"{path}, run {number}") for number, run in enumerate(runs_of(steps), start=1)]
    for note in notes:
        for run in runs:
            if run.entry.get(RUN_ID) == note[RUN_ID]:
                run.entry |= note
    if not runs and not records:
        raise DataError(f"{what}: {path} has no trajectory")
    return [*runs, *records]


def _record(entry: dict[str, Any], keys: Mapping[str, str], name: str) -> Record:
    sample = entry.get("trajectory")
    if isinstance(sample, dict) and "steps" in sample:
        record = record_of_atif(sample, name)
        record.entry = entry
        record.expected, record.output = entry.get("expected_output_obj"), entry.get("output_obj")
        return record
    if "steps" in entry and "agent" in entry:
        return record_of_atif(entry, name)
    taken = entry.get(keys["intermediate_steps"])
    if not isinstance(taken, list):
        return Record(name, entry=entry, problem=DropReason.UNREADABLE_RECORD)
    record = Record(name, entry=entry, steps=[step for step in taken if is_step(step)])
    record.question, record.expected = entry.get(keys["question"]), entry.get(keys["answer"])
    record.output = entry.get(keys["generated_answer"])
    read_calls(record, record.steps)
    return record


def _entries(path: Path) -> list[Any]:
    """The values of a JSON array, of one JSON object, or of JSON lines; a line that is no JSON is None."""
    text = read_text(path)
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError:
        return [_line(line) for line in lines_of(text)]


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
