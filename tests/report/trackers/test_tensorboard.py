"""TensorBoard's event files, read back with TensorBoard's own reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nat_plugin_evsys.report.trackers.base import Table, TrackedRun, Tracker
from nat_plugin_evsys.report.trackers.tensorboard import TensorBoardTracker

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(run: TrackedRun) -> Any:
    events = accumulator.EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    return events


def text(events: Any, tag: str) -> list[tuple[int, str]]:
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{tag}/text_summary")]


def test_metrics_config_and_tables(run: TrackedRun, table: Table, track: Callable[[Tracker], str]) -> None:
    tracker = TensorBoardTracker()
    where = track(tracker)
    tracker.table(replace(table, epoch=3))
    tracker.close("finished")

    assert where.startswith("tensorboard --logdir '")
    assert where.endswith("help desk'")
    events = read(run)
    assert [(event.step, event.value) for event in events.Scalars("epoch/reward")] == [(1, 0.5), (2, 0.75)]
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(2, -1.5)]
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(17, 3.0)]
    [(_, config)] = text(events, "config")
    assert config.splitlines() == [
        "    finetuning:",
        "      num_epochs: 3",
        "    llms:",
        "      policy:",
        "        api_key: <redacted>",
        "        stop: []",
    ]
    shown = text(events, "heldout/samples")
    assert [step for step, _ in shown] == [2, 3]
    assert shown[0][1].splitlines() == [
        "| row | question | wanted | reply | reward |",
        "| --- | --- | --- | --- | --- |",
        '| row-1 | Wifi \\| "broken"<br>again |  | réseau | 0.25 |',
        "| row-2 | Login | accounts |  |  |",
    ]


def test_a_resumed_run_goes_on_in_the_same_place(run: TrackedRun) -> None:
    for epoch in (1, 2):
        tracker = TensorBoardTracker()
        tracker.open(run)
        tracker.metrics({"epoch/reward": float(epoch)}, "epoch", epoch)
        tracker.close("interrupted")
    assert [event.step for event in read(run).Scalars("epoch/reward")] == [1, 2]
