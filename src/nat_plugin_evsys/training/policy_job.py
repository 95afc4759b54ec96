"""The work of a training job: trajectory groups -> Datums -> optimizer steps -> a published policy version."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from tinker import types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.calls import CallFate, CallTally, DropReason
from nat_plugin_evsys.json_lines import append_json_lines
from nat_plugin_evsys.rollouts.datums import DatumSet
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.datum_log import datum_records
from nat_plugin_evsys.training.fates import Learned, call_fates, learner_logprobs
from nat_plugin_evsys.training.job import uninterrupted
from nat_plugin_evsys.training.job_report import Account, JobReport
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, plan_steps, step_data
from nat_plugin_evsys.training.step import Advance, take_step, watched
from nat_plugin_evsys.training.step_metrics import StepMetrics

ADVICE = "Lower learning_rate or set grad_clip_norm, and look for extreme rewards"


class TrainingWork:
    """Trains a backend on trajectory groups.

    Args:
        groups: at least one.
        backend: gives the loaded backend.
        publish: makes the present weights the next served policy version and returns its number.
        datum_log: where every trained Datum is written, if anywhere.
    """

    def __init__(
        self,
        groups: list[TrajectoryGroup],
        settings: TrainingSettings,
        backend: Callable[[], Awaitable[Backend]],
        publish: Callable[[], Awaitable[int]],
        datum_log: Path | None = None,
    ) -> None:
        self._groups = groups
        self._settings = settings
        self._open_backend = backend
        self._publish = publish
        self.datum_log = datum_log
        self._sets: list[DatumSet] = []
        self._trained: set[int] = set()
        self._history: list[StepMetrics] = []
        self._learned: Learned = {}

    async def run(self, report: JobReport) -> None:
        """Build the Datums, take every optimizer step, publish.

        A cancellation lets the forward_backward + optim_step pair at work finish, so no half-accumulated gradient is
        left in the backend; what was trained until then is not published.

        Raises:
            JobError: the loss is not finite.
        """
        report.enter("preparing")
        backend = await self._open_backend()
        self._sets = await asyncio.to_thread(build_datums, self._groups, self._settings)
        steps = plan_steps(self._sets, self._settings)
        report.steps = len(steps)
        if not steps:
            report.message = self._nothing_to_train()
            return
        total = sum(self._sets[index].tokens for step in steps for index in step)
        for number, indices in enumerate(steps, start=1):
            report.step = number
            await uninterrupted(self._step(backend, indices, report, total))
        report.enter("publishing")
        await uninterrupted(self._publish_to(report))

    def account(self, lost_reason: DropReason) -> Account:
        """Where every call and trajectory went; see ``Work``."""
        account = Account(calls=CallTally(calls=sum(group.num_calls for group in self._groups)))
        if not self._sets:
            account.calls.drop(lost_reason, account.calls.calls)
            account.dropped_trajectories[lost_reason] = sum(len(group.calls_G) for group in self._groups)
            calls = [call for group in self._groups for calls in group.calls_G for call in calls]
            account.fates = {call.key: CallFate(dropped=lost_reason) for call in calls}
        for index, datums in enumerate(self._sets):
            account.calls.dropped.update(datums.dropped)
            account.dropped_trajectories.update(datums.dropped_trajectories)
            account.fates |= call_fates(datums, self._learned, None if index in self._trained else lost_reason)
            if index in self._trained:
                account.calls.trained += datums.trained_calls
                account.trained_trajectories += datums.trained_trajectories
            elif datums.datums:
                account.calls.drop(lost_reason, datums.trained_calls)
                account.dropped_trajectories[lost_reason] += datums.trained_trajectories
        return account

    async def _step(self, backend: Backend, indices: list[int], report: JobReport, total: int) -> None:
        batch = [self._sets[index] for index in indices]
        await take_step(
            backend,
            report,
            self._history,
            lambda advance: self._forward_backward(backend, batch, report, advance),
            self._settings.adam,
            tokens=sum(datums.tokens for datums in batch),
            sampled_tokens=sum(datums.sampled_tokens for datums in batch),
            total_tokens=total,
            advice=ADVICE,
        )
        new = [index for index in indices if index not in self._trained]
        self._trained.update(indices)
        await self._log_datums(new, report.step)

    async def _forward_backward(
        self, backend: Backend, batch: list[DatumSet], report: JobReport, advance: Advance
    ) -> types.ForwardBackwardOutput:
        settings = self._settings
        data = await step_data(backend, batch, settings)
        report.beat()
        pending = backend.forward_backward_async(data, loss_fn=settings.loss_fn, loss_fn_config=settings.loss_fn_config)
        output = await watched(pending, backend, advance)
        self._learned |= learner_logprobs(batch, output)
        return output

    async def _publish_to(self, report: JobReport) -> None:
        report.policy_version = await self._publish()

    async def _log_datums(self, indices: list[int], step: int) -> None:
        if self.datum_log is not None and indices:
            records = [record for index in indices for record in datum_records(self._sets[index], step)]
            await asyncio.to_thread(append_json_lines, self.datum_log, records)

    def _nothing_to_train(self) -> str:
        dropped = sum((datums.dropped for datums in self._sets), start=Counter[DropReason]())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items())) or "there were none"
        return f"nothing to train: every call was dropped ({reasons}); the policy is unchanged"
