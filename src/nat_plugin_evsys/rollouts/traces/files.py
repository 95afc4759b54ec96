"""Files of trajectories, told apart by what is in them.

- the lines of NAT's ``file`` telemetry exporter: one intermediate step each, of runs that went on at once;
- what an OpenTelemetry collector's ``file`` exporter writes of NAT's spans;
- ``workflow_output.json`` and ``workflow_output_atif.json`` of ``nat eval``;
- trajectories in ATIF, as an array, one in a line (also packed by gzip, as in ``rollouts/``), or one in a file;
- beside any of these or in a file of their own, notes: lines ``{"workflow_run_id": …, …}``, which add their fields (a
  feedback) to that run's record.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.json_lines import lines_of, read_text
from nat_plugin_evsys.rollouts.traces.atif_records import record_of_atif
from nat_plugin_evsys.rollouts.traces.otlp import BATCH, run_of, spans_of, steps_of
from nat_plugin_evsys.rollouts.traces.record import Record
from nat_plugin_evsys.rollouts.traces.steps import Step, ids_of, is_step, read_calls, record_of_run, runs_of

logger = logging.getLogger(__name__)

RUN_ID = "workflow_run_id"

_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What reading raises where something else stands than NAT writes there: others write these files too."""


def read_records(paths: Sequence[Path], keys: Mapping[str, str], what: str) -> list[Record]:
    """The records of some files, in their order. What cannot be read is a record too, with its reason.

    A note may be in another file than its run. Notes of no run are counted in the log.

    Args:
        keys: the names of ``question``, ``answer``, ``generated_answer`` and ``intermediate_steps`` in a row of
            ``nat eval``.
        what: the setting that names the files.

    Raises:
        ConfigError: no such file.
        DataError: a file cannot be read or is empty, or none has a trajectory.
    """
    contents = [_content(path, keys, what) for path in paths]
    records = [record for content in contents for record in content.records]
    if not records:
        raise DataError(f"{what}: {', '.join(map(str, paths))} has no trajectory")
    _add_notes([note for content in contents for note in content.notes], records)
    return records


@dataclass(slots=True)
class _Content:
    """What is in a file: its records, those of runs that were told step by step first, and notes on runs."""

    records: list[Record] = field(default_factory=list)
    notes: list[Mapping[str, Any]] = field(default_factory=list)
    lost: dict[str, Record] = field(default_factory=dict)
    """By their parents, the records of steps and spans that cannot be read."""

    def lose(self, name: str, entry: Any, parent: Any, error: Exception) -> None:
        """Keep what cannot be read as a record that says so."""
        self.records.append(_unreadable(name, entry, error))
        self.lost[str(parent)] = self.records[-1]


def _content(path: Path, keys: Mapping[str, str], what: str) -> _Content:
    if not path.is_file():
        raise ConfigError(no_file(what, path))
    content = _Content()
    steps: list[Step] = []
    spans: list[tuple[int, list[Step]]] = []
    for number, entry in enumerate(_entries(path), start=1):
        name = f"{path}, record {number}"
        try:
            if is_step(entry):
                steps.append(entry)
            elif BATCH in _object(entry):
                for span in spans_of(entry):
                    try:
                        spans.append(steps_of(span))
                    except _MALFORMED as error:
                        content.lose(name, span, run_of(span), error)
            elif _is_note(entry, keys):
                content.notes.append(entry)
            else:
                content.records.append(_record(entry, keys, name))
        except _MALFORMED as error:
            content.lose(name, entry, entry.get("parent_id") if isinstance(entry, dict) else None, error)
    steps += [step for _, of_span in sorted(spans, key=itemgetter(0)) for step in of_span]
    runs = enumerate(runs_of(steps), start=1)
    content.records[:0] = [_run(run, f"{path}, run {number}", content.lost) for number, run in runs]
    if not content.records and not content.notes:
        raise DataError(f"{what}: {path} has no trajectory")
    return content


def _add_notes(notes: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> None:
    of_run: dict[str, list[Record]] = {}
    for record in records:
        if (run := record.entry.get(RUN_ID)) is not None:
            of_run.setdefault(str(run), []).append(record)
    strays = []
    for note in notes:
        known = of_run.get(str(note[RUN_ID]), [])
        for record in known:
            record.entry |= note
        strays += [] if known else [note]
    if strays:
        logger.warning(
            "%d of %d lines that add to a run name a %s that no trajectory of these files has; the first is %r",
            len(strays),
            len(notes),
            RUN_ID,
            strays[0][RUN_ID],
        )


def _object(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise TypeError("no JSON object")
    return entry


def _is_note(entry: Mapping[str, Any], keys: Mapping[str, str]) -> bool:
    return RUN_ID in entry and not any(name in entry for name in ("steps", "trajectory", keys["intermediate_steps"]))


def _run(steps: Sequence[Step], name: str, lost: Mapping[str, Record]) -> Record:
    try:
        record = record_of_run(steps, name)
    except _MALFORMED as error:
        return _unreadable(name, {}, error)
    for gone in (lost[step] for step in ids_of(steps) if step in lost):
        record.problem, record.error = gone.problem, f"a step of the run cannot be read ({gone.name}: {gone.error})"
    return record


def _unreadable(name: str, entry: Any, error: Exception) -> Record:
    seen = f"no trajectory in a form that NAT writes ({type(error).__name__}: {error})"
    known = entry if isinstance(entry, dict) else {}
    return Record(name, entry=known, problem=DropReason.UNREADABLE_RECORD, error=seen)


def _record(entry: dict[str, Any], keys: Mapping[str, str], name: str) -> Record:
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
