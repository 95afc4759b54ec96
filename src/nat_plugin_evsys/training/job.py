"""One training job: an asyncio task with a state, an end that can be waited for, and a way to cancel it."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

from nat.data_models.finetuning import TrainingJobStatus, TrainingStatusEnum

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import EvsysError, causes
from nat_plugin_evsys.training.job_report import Account, JobReport

logger = logging.getLogger(__name__)

LOST_REASONS = {
    TrainingStatusEnum.COMPLETED: DropReason.NOT_REACHED,
    TrainingStatusEnum.FAILED: DropReason.JOB_FAILED,
    TrainingStatusEnum.CANCELED: DropReason.JOB_CANCELED,
}
"""Reason under which calls count that the job did not train on, by the state in which it ended."""


class Work(Protocol):
    """What a job does."""

    async def run(self, report: JobReport) -> None:
        """Do the work, updating ``report``. A cancellation never leaves a half-done step behind."""
        ...

    def account(self, lost_reason: DropReason) -> Account:
        """Where every call went; those that were not reached count under ``lost_reason``."""
        ...


class TrainingJob:
    """The life of one submit: PENDING until its turn comes, RUNNING, then finally COMPLETED, FAILED or CANCELED.

    Must be created in a running event loop.

    Args:
        run_id: NAT's run id; several jobs may share it.
        work: what to do.
        turn: held while the work runs, so that jobs run one after another in the order of their creation.
        job_id: unique; default: a new one.
        epoch: for the record.
        on_end: called once with the ended job, before waiters wake.
    """

    def __init__(
        self,
        run_id: str,
        work: Work,
        turn: asyncio.Lock,
        *,
        job_id: str | None = None,
        epoch: int | None = None,
        on_end: Callable[[TrainingJob], None] | None = None,
    ) -> None:
        self.job_id = job_id or uuid.uuid4().hex
        self.run_id = run_id
        self.epoch = epoch
        self.state = TrainingStatusEnum.PENDING
        self.report = JobReport()
        self.account: Account | None = None
        self.error: BaseException | None = None
        self.cancel_requested = False
        self._work: Work | None = work
        self._on_end = on_end
        self._ended = asyncio.Event()
        self._started_at: float | None = None
        self._seconds: float | None = None
        self.task: asyncio.Task[None] = asyncio.create_task(self._live(work, turn), name=f"training-job-{self.job_id}")
        self.task.add_done_callback(self._end)

    @property
    def ended(self) -> bool:
        """True once the state will not change any more."""
        return self._ended.is_set()

    async def wait(self, at_most: float | None = None) -> bool:
        """Wait for the end (at most ``at_most`` seconds); wakes at once. True if the job has ended."""
        try:
            await asyncio.wait_for(self._ended.wait(), at_most)
        except TimeoutError:
            return False
        return True

    def cancel(self) -> None:
        """Ask the job to stop: at once if it has not started, else after the current optimizer step."""
        if not self.ended:
            self.cancel_requested = True
            self.task.cancel()

    def status(self, backend: str) -> TrainingJobStatus:
        """The current state in NAT's form. After the end every call returns the same."""
        return TrainingJobStatus(
            run_id=self.run_id,
            backend=backend,
            status=self.state,
            progress=round(self.report.progress, 3),
            message=self._message(),
            metadata=self._metadata(),
        )

    async def _live(self, work: Work, turn: asyncio.Lock) -> None:
        async with turn:
            self.state = TrainingStatusEnum.RUNNING
            self._started_at = time.monotonic()
            await work.run(self.report)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Runs however a task ends, even if it was cancelled before its first step."""
        if task.cancelled():
            self.state = TrainingStatusEnum.CANCELED
        elif (error := task.exception()) is not None:
            self.state, self.error = TrainingStatusEnum.FAILED, error
            logger.error("training job %s failed", self.job_id, exc_info=error)
        else:
            self.state = TrainingStatusEnum.COMPLETED
            self.report.enter("done")
            self.report.advance(100.0)
        if self._started_at is not None:
            self._seconds = time.monotonic() - self._started_at
        try:
            if self._work is not None:
                # The work holds every Datum; it is let go with the job's end.
                work, self._work = self._work, None
                self.account = work.account(LOST_REASONS[self.state])
            if self._on_end is not None:
                self._on_end(self)
        finally:
            self._ended.set()

    def _message(self) -> str | None:
        if self.error is not None:
            return f"{self._where()} failed: {describe_error(self.error)}"
        if self.state is TrainingStatusEnum.CANCELED:
            return "canceled before its start" if self._started_at is None else f"canceled after {self._where()}"
        if self.cancel_requested and self.state is not TrainingStatusEnum.COMPLETED:
            return "cancel requested; it takes effect after the current optimizer step"
        return self.report.message

    def _where(self) -> str:
        step = f" of step {self.report.step}/{self.report.steps}" if self.report.step else ""
        return f"{self.report.phase}{step}"

    def _metadata(self) -> dict[str, Any]:
        report = self.report
        metadata: dict[str, Any] = {
            "job_id": self.job_id,
            "phase": report.phase,
            "step": report.step,
            "steps": report.steps,
            "loss": report.loss,
            "tokens_per_second": report.tokens_per_second,
            "metrics": dict(report.metrics),
        }
        if self.epoch is not None:
            metadata["epoch"] = self.epoch
        if self.state is TrainingStatusEnum.RUNNING:
            metadata["seconds_since_heartbeat"] = round(report.seconds_since_heartbeat, 1)
        if self.account is not None:
            metadata |= {
                "seconds": self._seconds,
                "metrics": {**report.metrics, **self.account.figures},
                "policy_version": report.policy_version,
                **self.account.as_metadata(),
            }
        if self.error is not None:
            metadata["error_type"] = type(root_cause(self.error)).__name__
            category = getattr(root_cause(self.error), "category", None)
            if category is not None:  # a Tinker service says who can mend it
                metadata["error_category"] = category
        return metadata


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of ``raise … from …``."""
    return list(causes(error))[-1]


def describe_error(error: BaseException) -> str:
    """An error's text with the first cause; others than this package's own get their class name."""
    words = str(error) or ("memory ran out" if isinstance(error, MemoryError) else "no text")
    text = words if isinstance(error, EvsysError) else f"{type(error).__name__}: {words}"
    first = root_cause(error)
    return text if first is error else f"{text} (first cause: {describe_error(first)})"
