"""The work of a NAT training job: the training loop with progress, an account of it, and a new policy version."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.training.job_report import Account, JobReport
from nat_plugin_evsys.training.loop import Steps, Taken, run_steps
from nat_plugin_evsys.training.uninterrupted import uninterrupted


class Material(Protocol):
    """What a job trains on."""

    advice: str
    """What the user may try when the loss is not finite."""

    async def prepare(self, backend: Backend) -> str | None:
        """Get ready for ``steps``; returns why there is nothing to train, if so."""
        ...

    def steps(self, backend: Backend) -> Steps:
        """The optimizer steps."""
        ...

    def trained(self, taken: Taken) -> list[dict[str, Any]]:
        """Count what a step trained on; returns a record of each Datum that was trained for the first time."""
        ...

    def account(self, lost_reason: DropReason) -> Account:
        """Where every call and trajectory went; those that were not reached count under ``lost_reason``."""
        ...


class TrainingWork:
    """Trains a backend on some material and publishes the result.

    Args:
        backend: gives the loaded backend.
        publish: makes the present weights the next served policy version and returns its number.
        datum_log: ``datums-<job>.jsonl``, where every trained Datum is written, if anywhere.
    """

    def __init__(
        self,
        material: Material,
        backend: Callable[[], Awaitable[Backend]],
        publish: Callable[[], Awaitable[int]],
        datum_log: Path | None = None,
    ) -> None:
        self._material = material
        self._open_backend = backend
        self._publish = publish
        self.datum_log = datum_log

    async def run(self, report: JobReport) -> None:
        """Prepare the material, take every optimizer step, publish.

        A cancellation lets the step at work finish; what was trained until then is not published.

        Raises:
            DataError: the material is malformed.
            JobError: the loss is not finite.
        """
        report.enter("preparing")
        backend = await self._open_backend()
        report.message = await self._material.prepare(backend)
        if report.message is not None:
            return
        report.beat()
        steps = self._material.steps(backend)
        await run_steps(backend, steps, on_step=self._record, report=report, advice=self._material.advice)
        report.enter("publishing")
        await uninterrupted(self._publish_to(report))

    def account(self, lost_reason: DropReason) -> Account:
        """See ``Material``."""
        return self._material.account(lost_reason)

    async def _record(self, taken: Taken) -> None:
        records = self._material.trained(taken)
        if self.datum_log is not None and records:
            await asyncio.to_thread(append_json_lines, self.datum_log, records)

    async def _publish_to(self, report: JobReport) -> None:
        report.policy_version = await self._publish()
        report.metrics |= (await self._open_backend()).take_rollout_figures()
