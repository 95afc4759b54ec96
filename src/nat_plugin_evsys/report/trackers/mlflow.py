"""MLflow, through its client; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME decide where a run goes."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun
from nat_plugin_evsys.report.trackers.extras import require_extra

if TYPE_CHECKING:
    from mlflow import MlflowClient

DIRECTORY = "mlruns"
"""The file store beside the run directories, where the environment names no server."""

ALLOW_FILES = "MLFLOW_ALLOW_FILE_STORE"

ENDINGS: dict[Ending, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}

RUN_TAG = "evsys.run"
"""Tag that finds a run again when it is resumed."""

PARAMETER_LENGTH, PARAMETERS_AT_ONCE = 500, 100
"""MLflow's own bounds of a parameter's value, and of the parameters in one request."""


class MlflowTracker:
    """Metrics over epochs and over steps, the configuration as parameters and as a file, and tables as artifacts."""

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._run_id = ""

    def check(self) -> None:
        """See Tracker."""
        require_extra("mlflow", "mlflow")

    def open(self, run: TrackedRun) -> str:
        """See Tracker."""
        uri, command = os.environ.get("MLFLOW_TRACKING_URI"), "mlflow ui"
        if not uri:
            uri = (run.directory.parent / DIRECTORY).resolve().as_uri()
            # Newer versions want a database instead, which MLflow's small package cannot open.
            os.environ.setdefault(ALLOW_FILES, "true")
            command = f"{ALLOW_FILES}=true {command}"
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project)
        self._run_id = self._begin(experiment, run)
        return f"{command} --backend-store-uri {shlex.quote(uri)}"

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        """See Tracker."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._open_client.log_batch(self._run_id, [Metric(name, value, now, at) for name, value in values.items()])

    def table(self, table: Table) -> None:
        """See Tracker."""
        columns = {name: [row[index] for row in table.rows] for index, name in enumerate(table.columns)}
        self._open_client.log_table(self._run_id, columns, f"{table.name}-epoch-{table.epoch:04d}.json")

    def close(self, ending: Ending) -> None:
        """See Tracker."""
        self._open_client.set_terminated(self._run_id, ENDINGS[ending])

    @property
    def _open_client(self) -> MlflowClient:
        assert self._client is not None, "open() comes first"
        return self._client

    def _experiment(self, name: str) -> str:
        found = self._open_client.get_experiment_by_name(name)
        return str(self._open_client.create_experiment(name) if found is None else found.experiment_id)

    def _begin(self, experiment: str, run: TrackedRun) -> str:
        from mlflow.entities import Param

        client = self._open_client
        for found in client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run.name}'", max_results=1):
            client.update_run(found.info.run_id, status="RUNNING")
            return str(found.info.run_id)
        made = client.create_run(experiment, run_name=run.name, tags={RUN_TAG: run.name}).info.run_id
        client.log_dict(made, dict(run.config), "config.yaml")
        parameters = [Param(name, str(value)[:PARAMETER_LENGTH]) for name, value in _flat(run.config)]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            client.log_batch(made, params=parameters[start : start + PARAMETERS_AT_ONCE])
        return str(made)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``finetuning.num_epochs`` -> 8 for everything that is set."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif value is not None and value != {} and value != []:
        yield prefix, value
