"""Every log has one policy for numbers that JSON has no word for, and one for a torn last line."""

from __future__ import annotations

import ast
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat.data_models.finetuning import TrainingJobRef

import nat_plugin_evsys
from nat_plugin_evsys.config import EvsysTrainerAdapterConfig, EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
from nat_plugin_evsys.json_lines import JsonLinesReader, append_json_lines, read_json_lines
from nat_plugin_evsys.policy.apis.dialect import event_of
from nat_plugin_evsys.report.metrics_log import MetricsLog
from nat_plugin_evsys.service.http.logs import JsonFormatter
from nat_plugin_evsys.training.job_ledger import JobLedger

SOURCE = Path(nat_plugin_evsys.__file__).parent
LOCK_FILES = {"files.py"}
"""Modules that open a file for appending without writing to it: it is a lock."""


def metrics(folder: Path, loss: float) -> None:
    MetricsLog(folder / "metrics.jsonl").append("epoch", 1, loss=loss)


def ledger(folder: Path, loss: float) -> None:
    JobLedger(folder).finished("job", "run", loss=loss)


def trainer_adapter(folder: Path, loss: float) -> None:
    policy: Any = None  # nothing is trained
    adapter = EvsysTrainerAdapter(EvsysTrainerAdapterConfig(policy="policy"), policy)
    adapter.log_progress(TrainingJobRef(run_id="run", backend="evsys"), {"loss": loss}, output_dir=str(folder))


def trajectory_builder(folder: Path, loss: float) -> None:
    EvsysTrajectoryBuilder(EvsysTrajectoryBuilderConfig()).log_progress("run", {"loss": loss}, output_dir=str(folder))


LOGS = (metrics, ledger, trainer_adapter, trajectory_builder)
Log = Callable[[Path, float], None]


def strict(line: str) -> Any:
    return json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("log", LOGS)
def test_every_log_writes_null_and_names_it(log: Log, tmp_path: Path) -> None:
    log(tmp_path, math.nan)
    log(tmp_path, -math.inf)
    log(tmp_path, 0.5)
    (path,) = tmp_path.iterdir()
    records = [strict(line) for line in path.read_text().splitlines()]
    assert [record["loss"] for record in records] == [None, None, 0.5]
    assert [record.get("non_finite") for record in records] == [{"loss": "nan"}, {"loss": "-inf"}, None]


@pytest.mark.parametrize("log", LOGS)
def test_every_log_removes_what_a_crash_left_of_a_line(
    log: Log, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log(tmp_path, 1.0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    log(tmp_path, 2.0)
    assert [record["loss"] for record in read_json_lines(path)] == [1.0, 2.0]
    assert f"{path}, line 2 is incomplete and was removed" in caplog.text
    assert path.read_bytes().startswith(whole)


LINE_ENDS = "a\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029b"
"""All that `str.splitlines` splits at; a model may sample any of it."""


def test_a_record_is_one_line_to_every_reader(tmp_path: Path) -> None:
    append_json_lines(tmp_path / "x.jsonl", [{"reply": LINE_ENDS}, {"reply": "b"}])
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["reply"] for line in lines] == [LINE_ENDS, "b"]


def test_an_event_of_the_endpoint_is_one_line_to_every_client() -> None:
    (line,) = event_of({"text": LINE_ENDS}).decode().rstrip("\n").splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": LINE_ENDS}


def test_the_services_log_has_the_same_numbers() -> None:
    record = logging.LogRecord("nat_plugin_evsys", logging.INFO, "", 0, "step", None, None)
    record.fields = {"loss": math.nan}
    assert strict(JsonFormatter().format(record))["loss"] is None


def test_a_line_that_no_crash_explains_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: not a JSON object: b'\[2\]'; remove the line"):
        read_json_lines(path)
    path.write_text("")
    append_json_lines(path, [])
    assert read_json_lines(path) == []


def test_a_line_is_parsed_once_while_its_log_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed, original = tmp_path / "x.jsonl", [], json.loads
    reader = JsonLinesReader(path)
    assert reader.read() == []
    monkeypatch.setattr(json, "loads", lambda line: (parsed.append(line), original(line))[1])
    for number in range(20):
        append_json_lines(path, [{"a": number}])
        assert [record["a"] for record in reader.read()] == list(range(number + 1))
    assert [line for line in parsed if line] == [b'{"a": %d}' % number for number in range(20)]


@pytest.mark.parametrize("text", ['{"a": 1}\n', '{"a": 1}\n{"a": 3}', '{"a": 0}\n{"a": 3}\n{"a": 4}\n{"a"', ""])
@pytest.mark.parametrize("replaced", [True, False])
def test_what_was_changed_is_read_again(text: str, replaced: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    reader = JsonLinesReader(path)
    reader.read()
    if replaced:
        atomic_write(path, text)
    else:
        path.write_text(text)
    assert reader.read() == read_json_lines(path)
    append_json_lines(path, [{"a": 6}])
    assert reader.read() == read_json_lines(path)
    path.unlink()
    assert reader.read() == []


def appends(node: ast.AST) -> bool:
    """True for ``open(…, "a")`` and ``path.open("ab")``."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).rpartition(".")[2] != "open":
        return False
    modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    modes += [keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)]
    return any(mode in ("a", "ab", "a+", "ab+", "at") for mode in modes)


def test_nothing_else_appends_to_a_file() -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(appends(node) for node in ast.walk(ast.parse(path.read_text())))
    }
    assert found == {"json_lines.py", *LOCK_FILES}
