"""Weights & Biases, through its own client; its environment variables set project, mode and server."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.report.trackers.base import Axis, Ending, Table, TrackedRun
from nat_plugin_evsys.report.trackers.extras import require_extra

AXES: tuple[Axis, ...] = ("epoch", "optimizer_step")


class WandbTracker:
    """Metrics over their own axes, the configuration, and browsable tables."""

    def __init__(self) -> None:
        self._run: Any = None
        self._axes: dict[str, Axis] = {}

    def check(self) -> None:
        """See Tracker. Without a key the library would ask for one on the terminal in the middle of the run."""
        require_extra("wandb", "wandb")
        if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
            return
        import wandb

        if not wandb.api.api_key:
            raise ConfigError(
                "trackers: wandb has no API key; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline to "
                "keep the run on this machine"
            )

    def open(self, run: TrackedRun) -> str:
        """See Tracker."""
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        wandb.setup(settings)  # or it prints hints before the run begins
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            id=run.name,
            name=os.environ.get("WANDB_NAME") or run.name,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.config),
            settings=settings,
        )
        for axis in AXES:
            self._run.define_metric(axis)
        if self._run.offline:
            return f"wandb sync {shlex.quote(str(self._run.settings.sync_dir))}"
        return str(self._run.url)

    def metrics(self, values: Mapping[str, float], axis: Axis, at: int) -> None:
        """See Tracker."""
        for name in values:
            if name not in self._axes:
                self._axes[name] = axis
                self._run.define_metric(name, step_metric=axis)
        self._run.log({**values, axis: at})

    def table(self, table: Table) -> None:
        """See Tracker."""
        import wandb

        rows = [list(row) for row in table.rows]
        self._run.log({table.name: wandb.Table(columns=list(table.columns), data=rows), "epoch": table.epoch})

    def close(self, ending: Ending) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if ending == "finished" else 1)
