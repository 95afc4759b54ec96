"""Trackers by the names that the YAML gives them."""

from __future__ import annotations

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.report.trackers.base import Tracker


def create_tracker(name: str) -> Tracker:
    """The tracker ``name``, checked.

    Raises:
        ConfigError: it is unknown, its extra is not installed, or its library lacks a setting.
    """
    tracker = _create(name)
    tracker.check()
    return tracker


def _create(name: str) -> Tracker:
    if name == "tensorboard":
        from nat_plugin_evsys.report.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker()
    if name == "wandb":
        from nat_plugin_evsys.report.trackers.wandb import WandbTracker

        return WandbTracker()
    if name == "mlflow":
        from nat_plugin_evsys.report.trackers.mlflow import MlflowTracker

        return MlflowTracker()
    raise ConfigError(f"trackers: there is no `{name}`; there are tensorboard, wandb and mlflow")
