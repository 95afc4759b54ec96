"""NAT's telemetry during a run: one set of exporters for all rollouts, and the logging of ``general.telemetry``.

NAT builds exporters with each workflow builder. `nat finetune` has one builder that it leaves before training, and each
evaluation has one of its own: an exporter that owns a file then finds it taken by the builder before. So the first
builder's exporters are kept for the whole run, and evaluations build none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from nat.builder.child_builder import ChildBuilder
from nat.builder.context import ContextState
from nat.builder.workflow_builder import WorkflowBuilder
from nat.observability.exporter_manager import ExporterManager
from nat.observability.mixin.file_mode import FileMode
from nat.observability.register import FileTelemetryExporterConfig

from nat_plugin_evsys.errors import ConfigError

if TYPE_CHECKING:
    from nat.builder.builder import Builder
    from nat.data_models.config import Config, GeneralConfig
    from nat.observability.exporter.base_exporter import BaseExporter

logger = logging.getLogger(__name__)

DRAIN_TIMEOUT = 10.0
"""Seconds that the exports of a rollout may take after its end before the run goes away without them."""


class RunExporters:
    """The exporters of a run. Each rollout has copies of its own, as NAT's workflow runs have.

    Attributes:
        names: what the YAML calls them.
    """

    def __init__(self, exporters: dict[str, BaseExporter]) -> None:
        self.names = list(exporters)
        self._manager = ExporterManager.from_exporters(exporters)
        self._exports: set[asyncio.Task[None]] = set()
        self._failed: set[str] = set()

    @classmethod
    def of(cls, builder: Builder) -> RunExporters:
        """The exporters that the YAML names, as built by ``builder``."""
        parent = builder._workflow_builder if isinstance(builder, ChildBuilder) else builder
        if not isinstance(parent, WorkflowBuilder):
            return cls({})
        # NAT hands them to the workflow that it builds, and offers no other way to them.
        return cls({name: built.instance for name, built in parent._telemetry_exporters.items()})

    @asynccontextmanager
    async def exporting(self) -> AsyncIterator[None]:
        """Within it, this context's workflow run is exported. A failing exporter does not end a rollout."""
        async with AsyncExitStack() as stack:
            copies = self._manager.create_isolated_exporters(ContextState.get())
            for name, exporter in copies.items():
                try:
                    await stack.enter_async_context(exporter.start())
                except Exception as error:  # noqa: BLE001 - another's service may fail in any way; it is told once
                    self._tell(name, error)
            try:
                yield
            finally:
                for exporter in copies.values():
                    self._keep(asyncio.ensure_future(exporter.wait_for_tasks(DRAIN_TIMEOUT)))
                # Once a copy has been stopped it no longer knows its exports, so the waiting begins before.
                await asyncio.sleep(0)

    async def drain(self) -> None:
        """Wait until everything is exported, up to a time limit."""
        if self._exports:
            await asyncio.wait(self._exports, timeout=DRAIN_TIMEOUT)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._exports.add(task)
        task.add_done_callback(self._exports.discard)

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            logger.warning("telemetry exporter `%s` cannot start; the run continues without it: %s", name, error)


def without_exporters(general: GeneralConfig) -> GeneralConfig:
    """For a builder that must not make exporters or log handlers of its own."""
    return general.model_copy(update={"telemetry": general.telemetry.model_copy(update={"tracing": {}, "logging": {}})})


@asynccontextmanager
async def run_logging(general: GeneralConfig) -> AsyncIterator[None]:
    """Within it, ``general.telemetry.logging`` is in force, also between the evaluations."""
    tracing_off = general.telemetry.model_copy(update={"tracing": {}})
    async with WorkflowBuilder(general_config=general.model_copy(update={"telemetry": tracing_off})):
        yield


def check_exporters(config: Config) -> None:
    """Refuse a file exporter that starts over with every rollout.

    Raises:
        ConfigError: a file exporter with ``mode: overwrite``; NAT opens its file once for each workflow run.
    """
    for name, exporter in config.general.telemetry.tracing.items():
        if isinstance(exporter, FileTelemetryExporterConfig) and exporter.mode is FileMode.OVERWRITE:
            raise ConfigError(
                f"general.telemetry.tracing.{name}: with `mode: overwrite` every rollout would overwrite the "
                "file, and only the last trace would be left; set `mode: append`"
            )
