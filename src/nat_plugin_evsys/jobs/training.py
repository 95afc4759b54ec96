"""The work of a training job: trajectory groups -> Datums -> optimizer steps -> a published policy version."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tinker import types

from ..algorithms.policy_gradient import TrainingSettings, build_datums, plan_steps, step_data
from ..backends.base import Backend
from ..errors import JobError, NonFiniteGradientError
from ..rollouts.datums import DatumSet
from ..rollouts.trajectories import TrajectoryGroup
from ..types import CallTally
from .datum_log import datum_records
from .job import uninterrupted
from .ledger import append_json_lines
from .metrics import StepMetrics, summarize
from .report import Account, JobReport

T = TypeVar("T")

POLL_SECONDS = 0.2
"""How often a backend is asked how far its forward_backward is."""

STEPS_SHARE = 98.0
"""Progress when all optimizer steps are done; publishing is the rest."""

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

    def account(self, lost_reason: str) -> Account:
        """Where every call and trajectory went; see ``Work``."""
        account = Account(calls=CallTally(calls=sum(group.num_calls for group in self._groups)))
        if not self._sets:
            account.calls.drop(lost_reason, account.calls.calls)
            account.dropped_trajectories[lost_reason] = sum(len(group.calls_G) for group in self._groups)
        for index, datums in enumerate(self._sets):
            account.calls.dropped.update(datums.dropped)
            account.dropped_trajectories.update(datums.dropped_trajectories)
            if index in self._trained:
                account.calls.trained += datums.trained_calls
                account.trained_trajectories += datums.trained_trajectories
            elif datums.datums:
                account.calls.drop(lost_reason, datums.trained_calls)
                account.dropped_trajectories[lost_reason] += datums.trained_trajectories
        return account

    async def _step(self, backend: Backend, indices: list[int], report: JobReport, total: int) -> None:
        batch = [self._sets[index] for index in indices]
        tokens = sum(datums.tokens for datums in batch)
        before = sum(metrics.tokens for metrics in self._history)
        started = time.monotonic()

        def advance(fraction: float) -> None:
            report.advance(STEPS_SHARE * (before + fraction * tokens) / total)

        report.enter("forward_backward")
        output = await self._forward_backward(backend, batch, report, advance)
        report.loss = output.metrics.get("loss:sum")
        await check_loss(backend, report, ADVICE)
        report.enter("optim_step")
        response = await backend.optim_step_async(self._settings.adam)
        advance(1.0)
        self._history.append(
            StepMetrics(
                tokens=tokens,
                sampled_tokens=sum(datums.sampled_tokens for datums in batch),
                seconds=time.monotonic() - started,
                values={**output.metrics, **(response.metrics or {})},
            )
        )
        report.metrics = summarize(self._history)
        report.tokens_per_second = report.metrics["tokens_per_second"]
        new = [index for index in indices if index not in self._trained]
        self._trained.update(indices)
        await self._log_datums(new, report.step)

    async def _forward_backward(
        self, backend: Backend, batch: list[DatumSet], report: JobReport, advance: Callable[[float], None]
    ) -> types.ForwardBackwardOutput:
        settings = self._settings
        data = await step_data(backend, batch, settings)
        report.beat()
        pending = backend.forward_backward_async(data, loss_fn=settings.loss_fn, loss_fn_config=settings.loss_fn_config)
        return await watched(pending, backend, advance)

    async def _publish_to(self, report: JobReport) -> None:
        report.policy_version = await self._publish()

    async def _log_datums(self, indices: list[int], step: int) -> None:
        if self.datum_log is not None and indices:
            records = [record for index in indices for record in datum_records(self._sets[index], step)]
            await asyncio.to_thread(append_json_lines, self.datum_log, records)

    def _nothing_to_train(self) -> str:
        dropped = sum((datums.dropped for datums in self._sets), start=Counter[str]())
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(dropped.items())) or "there were none"
        return f"nothing to train: every call was dropped ({reasons}); the policy is unchanged"


async def watched(pending: Awaitable[T], backend: Backend, advance: Callable[[float], None]) -> T:
    """Await an operation, asking the backend now and then how far it is: ``progress -> (done, total) tokens``."""
    future = asyncio.ensure_future(pending)
    seen = getattr(backend, "progress", None)
    while not future.done():
        await asyncio.wait({future}, timeout=POLL_SECONDS)
        now = getattr(backend, "progress", None)
        if now is not None and now != seen:
            done, total = seen = now
            advance(min(done / total, 1.0) if total else 0.0)
    return future.result()


async def check_loss(backend: Backend, report: JobReport, advice: str) -> None:
    """Refuse to step on a loss that is no finite number, and leave no gradient of it behind.

    Args:
        advice: what the user may try; ends the error's text.

    Raises:
        JobError: ``report.loss`` is None or not finite.
    """
    if report.loss is not None and math.isfinite(report.loss):
        return
    await _discard_gradient(backend)
    seen = "the backend returned no `loss:sum`" if report.loss is None else f"the loss (`loss:sum`) is {report.loss}"
    raise JobError(f"step {report.step}/{report.steps}: {seen}; the weights are as the step before left them. {advice}")


async def _discard_gradient(backend: Backend) -> None:
    """Clear the accumulated gradient, so that the next job does not start with it.

    Where the backend has no call for it, a step that moves no weight does it: a gradient that is not finite is refused
    and cleared, a finite one enters the moments only.
    """
    discard = getattr(backend, "discard_gradient_async", None)
    if discard is not None:
        await discard()
        return
    with contextlib.suppress(NonFiniteGradientError):
        await backend.optim_step_async(types.AdamParams(learning_rate=0.0, weight_decay=0.0))
