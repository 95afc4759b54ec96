"""Weights & Biases offline: the run's file, read back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from wandb_file import config, exit_code, finished_file, history

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.report.trackers.base import Ending, Table, TrackedRun
from nat_plugin_evsys.report.trackers.wandb import WandbTracker

pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_metrics_config_and_tables(run: TrackedRun, table: Table, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = WandbTracker()
    tracker.check()
    where = tracker.open(run)
    tracker.metrics({"epoch/reward": 0.5, "training/loss": -1.5}, "epoch", 1)
    tracker.metrics({"step/loss": 3.0}, "optimizer_step", 17)
    tracker.table(table)
    tracker.close("finished")
    assert "wandb" not in capfd.readouterr().err

    command, sync, directory = shlex.split(where)
    assert (command, sync) == ("wandb", "sync")
    assert Path(directory).is_relative_to(run.directory)
    file = finished_file(Path(directory))
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in history(file)]
    assert rows[:2] == [
        {"epoch": 1, "epoch/reward": 0.5, "training/loss": -1.5},
        {"optimizer_step": 17, "step/loss": 3.0},
    ]
    assert rows[2]["epoch"] == 2
    assert rows[2]["heldout/samples/_type"] == "table-file"
    shown = json.loads((Path(directory) / "files" / rows[2]["heldout/samples/path"]).read_text())
    assert shown["columns"] == list(table.columns)
    assert shown["data"] == [list(row) for row in table.rows]
    assert config(file)["finetuning"] == {"num_epochs": 3}
    assert config(file)["llms"]["policy"]["api_key"] == "<redacted>"
    assert exit_code(file) == 0


@pytest.mark.parametrize("ending", ["failed", "interrupted"])
def test_a_run_that_did_not_finish_has_failed(run: TrackedRun, ending: Ending) -> None:
    tracker = WandbTracker()
    _, _, directory = shlex.split(tracker.open(run))
    tracker.close(ending)
    file = finished_file(Path(directory))
    assert exit_code(file) == 1


def test_without_a_key_it_is_refused_instead_of_asking_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        WandbTracker().check()
