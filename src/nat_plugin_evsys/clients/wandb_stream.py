"""Streams a training client's metrics to Weights & Biases (Loops: ``wandb_config``)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from nat_plugin_evsys.clients.loops import WandbConfig
from nat_plugin_evsys.errors import ConfigError

logger = logging.getLogger(__name__)


def check_wandb_config(given: Any) -> WandbConfig | None:
    """None, or a WandbConfig where wandb is installed.

    Raises:
        ConfigError: something else, or wandb is not installed.
    """
    if given is None:
        return None
    if not isinstance(given, WandbConfig):
        raise ConfigError(f"wandb_config is a {type(given).__name__}; give types.WandbConfig(project=…)")
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb_config: wandb is not installed; pip install 'nat_plugin_evsys[wandb]'")
    return given


class WandbStream:
    """One run of wandb: the metrics of every forward_backward and optimizer step, over the optimizer steps.

    wandb's environment variables (``WANDB_MODE``, ``WANDB_DIR``, …) apply. If it refuses metrics, that is logged and
    training continues.

    Args:
        facts: the run's configuration, as wandb shows it.
    """

    def __init__(self, config: WandbConfig, facts: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        wandb.setup(settings)  # or it prints hints before the run begins
        self._run: Any = wandb.init(
            project=config.project, name=config.name, config=dict(facts), settings=settings, reinit="create_new"
        )
        self._run.define_metric("*", step_metric="optimizer_step")

    def log(self, operation: str, metrics: Mapping[str, float] | None, step: int) -> None:
        """The metrics of an operation, as ``<operation>/<metric>``; ``step`` optimizer steps have been taken."""
        named = {f"{operation}/{name}": value for name, value in (metrics or {}).items()}
        try:
            self._run.log({**named, "optimizer_step": step})
        except Exception:  # whatever wandb raises, the training itself has succeeded
            logger.warning("wandb did not accept the metrics of optimizer step %d", step, exc_info=True)

    def close(self) -> None:
        """Finish the run. Idempotent."""
        run, self._run = self._run, None
        if run is not None:
            run.finish()
