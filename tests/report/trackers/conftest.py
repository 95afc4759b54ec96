"""A run to be tracked."""

from __future__ import annotations

from pathlib import Path

import pytest

from nat_plugin_evsys.report.trackers.base import Table, TrackedRun


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
