"""MLflow's file store, read back with MLflow's own client."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from nat_plugin_evsys.report.trackers.base import Ending, Table, TrackedRun, Tracker
from nat_plugin_evsys.report.trackers.mlflow import MlflowTracker

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def read(run: TrackedRun) -> tuple[Any, Any]:
    """A client of the store beside the run, and the one run that is in it."""
    client = mlflow.MlflowClient(tracking_uri=(run.directory.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name(run.project)
    [found] = client.search_runs([experiment.experiment_id])
    return client, found


def values(client: Any, found: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]


def test_metrics_config_and_tables(run: TrackedRun, table: Table, track: Callable[[Tracker], str]) -> None:
    tracker = MlflowTracker()
    where = track(tracker)
    tracker.close("finished")

    client, found = read(run)
    assert found.info.run_name == "run-1"
    assert found.info.status == "FINISHED"
    assert values(client, found, "epoch/reward") == [(1, 0.5), (2, 0.75)]
    assert values(client, found, "training/loss") == [(2, -1.5)]
    assert values(client, found, "step/loss") == [(17, 3.0)]
    assert found.data.params == {"finetuning.num_epochs": "3", "llms.policy.api_key": "<redacted>"}
    assert yaml.safe_load(mlflow.artifacts.load_text(f"{found.info.artifact_uri}/config.yaml")) == run.config
    shown = mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/heldout/samples-epoch-0002.json")
    assert shown == {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
    assert shlex.split(where)[-1].endswith("/help%20desk/mlruns")


@pytest.mark.parametrize(("ending", "status"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_how_a_run_ended(run: TrackedRun, ending: Ending, status: str) -> None:
    tracker = MlflowTracker()
    tracker.open(run)
    tracker.close(ending)
    assert read(run)[1].info.status == status


def test_a_resumed_run_is_the_same_run(run: TrackedRun) -> None:
    for epoch in (1, 2):
        tracker = MlflowTracker()
        tracker.open(run)
        tracker.metrics({"epoch/reward": float(epoch)}, "epoch", epoch)
        tracker.close("finished")
    client, found = read(run)
    assert values(client, found, "epoch/reward") == [(1, 1.0), (2, 2.0)]


def test_more_settings_than_fit_into_one_request(run: TrackedRun) -> None:
    many = TrackedRun(run.name, run.project, run.directory, {f"setting-{n}": "x" * 600 for n in range(250)})
    tracker = MlflowTracker()
    tracker.open(many)
    tracker.close("finished")
    parameters = read(run)[1].data.params
    assert len(parameters) == 250
    assert {len(value) for value in parameters.values()} == {500}
