"""A run to be tracked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nat_plugin_evsys.report.trackers.base import Table, TrackedRun, Tracker


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    directory = tmp_path / "help desk" / "run-1"
    directory.mkdir(parents=True)
    config = {"finetuning": {"num_epochs": 3}, "llms": {"policy": {"api_key": "<redacted>", "stop": []}}}
    return TrackedRun("run-1", "help desk", directory, config)


@pytest.fixture
def table() -> Table:
    rows = [("row-1", 'Wifi | "broken"\nagain', None, "réseau", 0.25), ("row-2", "Login", "accounts", "", None)]
    return Table("heldout/samples", 2, ("row", "question", "wanted", "reply", "reward"), rows)


@pytest.fixture
def track(run: TrackedRun, table: Table) -> Callable[[Tracker], str]:
    """``track(tracker)``: two epochs, a step and a table; returns where the run is shown."""

    def all_of_it(tracker: Tracker) -> str:
        tracker.check()
        where = tracker.open(run)
        tracker.metrics({"epoch/reward": 0.5}, "epoch", 1)
        tracker.metrics({"epoch/reward": 0.75, "training/loss": -1.5}, "epoch", 2)
        tracker.metrics({"step/loss": 3.0}, "optimizer_step", 17)
        tracker.table(table)
        return where

    return all_of_it
