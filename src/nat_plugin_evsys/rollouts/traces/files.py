"""Files of trajectories, told apart by what is in them.

- the lines of NAT's ``file`` telemetry exporter: one intermediate step each, of runs that went on at once;
- what an OpenTelemetry collector's ``file`` exporter writes of NAT's spans;
- ``workflow_output.json`` and ``workflow_output_atif.json`` of ``nat eval``;
- trajectories in ATIF, as an array, one in a line (also packed by gzip, as in ``rollouts/``), or one in a file;
- beside any steps, lines ``{"workflow_run_id": …, …}``, which add their fields (a feedback) to that run's record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.json_lines import lines_of, read_text
from nat_plugin_evsys.rollouts.traces.atif_records import record_of_atif
from nat_plugin_evsys.rollouts.traces.otlp import BATCH, steps_of_batch
from nat_plugin_evsys.rollouts.traces.record import Record
from nat_plugin_evsys.rollouts.traces.steps import Step, is_step, read_calls, record_of_run, runs_of

RUN_ID = "workflow_run_id"

_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def read_records(paths: Sequence[Path], keys: Mapping[str, str], what: str) -> list[Record]:
    """The records of some files, in their order. What cannot be read is a record too, with its reason.

    Args:
        keys: the names of ``question``, ``answer``, ``generated_answer`` and ``intermediate_steps`` in a row of
            ``nat eval``.
        what: the setting that names the files.

    Raises:
        ConfigError: no such file.
        DataError: a file cannot be read, or has no record.
    """
    return [record for path in paths for record in _records(path, keys, what)]


def _records(path: Path, keys: Mapping[str, str], what: str) -> list[Record]:
    if not path.is_file():
        raise ConfigError(no_file(what, path))
    steps: list[Step] = []
    spans: list[tuple[int, list[Step]]] = []
    notes: list[Mapping[str, Any]] = []
    records: list[Record] = []
    for number, entry in enumerate(_entries(path), start=1):
        name = f"{path}, record {number}"
        if is_step(entry):
            steps.append(entry)
        elif isinstance(entry, dict) and RUN_ID in entry:
            notes.append(entry)
        elif isinstance(entry, dict) and BATCH in entry:
            try:
                spans += steps_of_batch(entry)
            except _MALFORMED as error:
                records.append(_unreadable(name, entry, error))
        else:
            records.append(_readable(name, entry, partial(_record, entry, keys, name)))
    steps += [step for _, of_span in sorted(spans, key=itemgetter(0)) for step in of_span]
    runs = [
        _readable(name, {}, partial(record_of_run, run, name))
        for run, name in ((run, f"{path}, run {number}") for number, run in enumerate(runs_of(steps), start=1))
    ]
    for note in notes:
        for run in runs:
            if run.entry.get(RUN_ID) == note[RUN_ID]:
                run.entry |= note
    if not runs and not records:
        raise DataError(f"{what}: {path} has no trajectory")
    return [*runs, *records]


def _readable(name: str, entry: Any, read: Callable[[], Record]) -> Record:
    """What ``read`` makes of an entry. Others write these files, so anything may stand in any place of one."""
    try:
        return read()
    except _MALFORMED as error:
        return _unreadable(name, entry, error)


def _unreadable(name: str, entry: Any, error: Exception) -> Record:
    seen = f"no trajectory in a form that NAT writes ({type(error).__name__}: {error})"
    known = entry if isinstance(entry, dict) else {}
    return Record(name, entry=known, problem=DropReason.UNREADABLE_RECORD, error=seen)


def _record(entry: Any, keys: Mapping[str, str], name: str) -> Record:
    if not isinstance(entry, dict):
        raise TypeError("no JSON object")
    sample = entry.get("trajectory")
    if isinstance(sample, dict) and "steps" in sample:
        record = record_of_atif(sample, name)
        record.entry = entry
        record.expected, record.output = entry.get("expected_output_obj"), entry.get("output_obj")
        return record
    if "steps" in entry and "agent" in entry:
        return record_of_atif(entry, name)
    taken = entry[keys["intermediate_steps"]]
    if not isinstance(taken, list) or not all(map(is_step, taken)):
        raise TypeError(f"`{keys['intermediate_steps']}` is no list of intermediate steps")
    record = Record(name, entry=entry, steps=taken)
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
