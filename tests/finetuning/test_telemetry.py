"""NAT's exporters around rollouts: one set for a run, and none of them can end a rollout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nat.builder.context import ContextState
from nat.builder.workflow_builder import WorkflowBuilder
from nat.data_models.config import Config, GeneralConfig
from nat.data_models.intermediate_step import IntermediateStep, IntermediateStepPayload, IntermediateStepType
from nat.data_models.invocation_node import InvocationNode
from nat.observability.exporter.file_exporter import FileExporter
from nat.observability.mixin.file_mode import FileMode
from nat.observability.register import FileLoggingMethod, FileTelemetryExporterConfig
from nat.utils.reactive.subject import Subject
from nat_process import json_lines

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.finetuning.telemetry import RunExporters, check_exporters, run_logging, without_exporters


def step(name: str) -> IntermediateStep:
    return IntermediateStep(
        parent_id="root",
        function_ancestry=InvocationNode(function_id="f", function_name="f"),
        payload=IntermediateStepPayload(event_type=IntermediateStepType.CUSTOM_START, name=name),
    )


async def rollout(exporters: RunExporters, name: str, fails: bool = False) -> None:
    """What a workflow run does with the event stream of its context."""
    stream: Subject = Subject()
    ContextState.get().event_stream.set(stream)
    async with exporters.exporting():
        stream.on_next(step(name))
        await asyncio.sleep(0)
        if fails:
            raise ZeroDivisionError
        stream.on_next(step(name))


def traced(path: Path) -> list[str]:
    return sorted(line["payload"]["name"] for line in json_lines(path))


async def test_rollouts_at_the_same_time_export_to_one_file_what_is_theirs(tmp_path: Path) -> None:
    exporters = RunExporters({"f": FileExporter(output_path=str(tmp_path / "trace.jsonl"), project="p")})
    names = [f"rollout {number}" for number in range(20)]
    await asyncio.gather(*(rollout(exporters, name) for name in names))
    await exporters.drain()
    assert traced(tmp_path / "trace.jsonl") == sorted(names * 2)


async def test_a_rollout_that_fails_is_exported_up_to_there(tmp_path: Path) -> None:
    exporters = RunExporters({"f": FileExporter(output_path=str(tmp_path / "trace.jsonl"), project="p")})
    with pytest.raises(ZeroDivisionError):
        await rollout(exporters, "before", fails=True)
    await exporters.drain()
    assert traced(tmp_path / "trace.jsonl") == ["before"]


class Unreachable(FileExporter):
    """An exporter whose service is not there."""

    @asynccontextmanager
    async def start(self) -> AsyncIterator[None]:
        raise ConnectionError("no route to the collector")
        yield


async def test_an_exporter_that_cannot_start_is_told_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = FileExporter(output_path=str(tmp_path / "trace.jsonl"), project="p")
    gone = Unreachable(output_path=str(tmp_path / "gone.jsonl"), project="p")
    exporters = RunExporters({"gone": gone, "there": there})
    await rollout(exporters, "first")
    await rollout(exporters, "second")
    await exporters.drain()
    assert traced(tmp_path / "trace.jsonl") == ["first", "first", "second", "second"]
    told = [record.message for record in caplog.records if "cannot start" in record.message]
    assert told == [
        "telemetry exporter `gone` cannot start; the run continues without it: no route to the collector",
    ]


def general(**telemetry: Any) -> GeneralConfig:
    made = GeneralConfig()
    return made.model_copy(update={"telemetry": made.telemetry.model_copy(update=telemetry)})


async def test_the_first_builders_exporters_are_taken_and_no_second_one_is_built(tmp_path: Path) -> None:
    file = FileTelemetryExporterConfig(output_path=str(tmp_path / "trace.jsonl"), project="p")
    settings = general(tracing={"f": file})
    async with WorkflowBuilder(general_config=settings) as builder:
        exporters = RunExporters.of(builder)
    async with WorkflowBuilder(general_config=without_exporters(settings)) as second:
        assert RunExporters.of(second).names == []
    await rollout(exporters, "one")
    await exporters.drain()
    assert exporters.names == ["f"]
    assert traced(tmp_path / "trace.jsonl") == ["one", "one"]


async def test_log_files_of_the_yaml_are_open_for_the_whole_run_and_closed_after_it(tmp_path: Path) -> None:
    path, log = tmp_path / "nat.log", logging.getLogger("a.user")
    settings = general(logging={"l": FileLoggingMethod(path=str(path), level="INFO", mode=FileMode.OVERWRITE)})
    level = logging.getLogger().level
    async with run_logging(settings):
        log.warning("between two evaluations")
        async with WorkflowBuilder(general_config=without_exporters(settings)):
            log.warning("in an evaluation")
    logging.getLogger().setLevel(level)
    log.warning("afterwards")
    assert [line.rpartition(" - ")[2] for line in path.read_text().splitlines()] == [
        "between two evaluations",
        "in an evaluation",
    ]


async def test_overwrite_would_keep_the_last_rollout_alone_so_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    exporters = RunExporters({"f": FileExporter(output_path=str(path), project="p", mode=FileMode.OVERWRITE)})
    for name in ("first", "second"):
        await rollout(exporters, name)
        await exporters.drain()
    assert set(traced(path)) == {"second"}

    file = FileTelemetryExporterConfig(output_path=str(path), project="p", mode=FileMode.OVERWRITE)
    with pytest.raises(ConfigError, match=r"general.telemetry.tracing.f: .*set `mode: append`"):
        check_exporters(Config(general=general(tracing={"f": file})))
