import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from nat.data_models.finetuning import TrainingStatusEnum

from nat_plugin_evsys.calls import CallTally
from nat_plugin_evsys.errors import JobError
from nat_plugin_evsys.training.job import TrainingJob, describe_error
from nat_plugin_evsys.training.job_report import Account, JobReport
from nat_plugin_evsys.training.uninterrupted import uninterrupted


class Work:
    def __init__(self, body: Callable[[JobReport], Awaitable[None]]) -> None:
        self._body = body

    async def run(self, report: JobReport) -> None:
        await self._body(report)

    def account(self, lost_reason: str) -> Account:
        account = Account(calls=CallTally(calls=2, trained=1))
        account.calls.drop(lost_reason, 1)
        return account


async def nothing(report: JobReport) -> None:
    report.message = "did nothing"


def job_of(body: Callable[[JobReport], Awaitable[None]], turn: asyncio.Lock | None = None) -> TrainingJob:
    return TrainingJob("run", Work(body), turn or asyncio.Lock())


async def test_jobs_run_one_after_another_in_order() -> None:
    turn, trace, gate = asyncio.Lock(), [], asyncio.Event()

    def body(name: str) -> Callable[[JobReport], Awaitable[None]]:
        async def run(report: JobReport) -> None:
            trace.append(f"{name} in")
            await gate.wait()
            trace.append(f"{name} out")

        return run

    jobs = [job_of(body(name), turn) for name in "abc"]
    await asyncio.sleep(0.01)
    assert [job.state for job in jobs] == ["running", "pending", "pending"]
    gate.set()
    assert all([await job.wait() for job in jobs])
    assert trace == ["a in", "a out", "b in", "b out", "c in", "c out"]
    assert len({job.job_id for job in jobs}) == 3


async def test_cancel_before_the_start_is_immediate_and_does_not_hold_up_the_next() -> None:
    turn, gate = asyncio.Lock(), asyncio.Event()

    async def blocked(report: JobReport) -> None:
        await gate.wait()

    first, second, third = job_of(blocked, turn), job_of(nothing, turn), job_of(nothing, turn)
    never_scheduled = job_of(nothing, turn)
    never_scheduled.cancel()
    await never_scheduled.wait(1)
    assert never_scheduled.state is TrainingStatusEnum.CANCELED
    second.cancel()
    assert await second.wait(1)
    status = second.status("evsys")
    assert (status.status, status.message, status.progress) == ("canceled", "canceled before its start", 0.0)
    assert status.metadata is not None
    assert status.metadata["dropped"] == {"job_canceled": 1}
    assert first.state is TrainingStatusEnum.RUNNING
    gate.set()
    await third.wait(1)
    assert third.state is TrainingStatusEnum.COMPLETED


async def test_waiters_wake_at_once() -> None:
    async def brief(report: JobReport) -> None:
        await asyncio.sleep(0.05)

    job = job_of(brief)
    started = time.monotonic()
    assert await job.wait(60)
    assert time.monotonic() - started < 1
    assert not await job_of(brief).wait(0.001)


async def test_failure_names_phase_step_and_first_cause() -> None:
    async def failing(report: JobReport) -> None:
        report.enter("optim_step")
        report.step, report.steps = 2, 3
        try:
            raise OSError("disk full")
        except OSError as error:
            raise RuntimeError("no luck") from error

    job = job_of(failing)
    await job.wait()
    status = job.status("evsys")
    assert status.status is TrainingStatusEnum.FAILED
    assert status.message == ("optim_step of step 2/3 failed: RuntimeError: no luck (first cause: OSError: disk full)")
    assert status.metadata is not None
    assert status.metadata["error_type"] == "OSError"
    assert status.metadata["dropped"] == {"job_failed": 1}
    assert job.status("evsys") == status
    with pytest.raises(RuntimeError, match="no luck"):
        await job.task


def test_errors_of_this_package_speak_for_themselves() -> None:
    assert describe_error(JobError("the loss is nan")) == "the loss is nan"
    assert describe_error(KeyError("x")) == "KeyError: 'x'"


async def test_progress_never_falls_and_status_is_the_same_twice() -> None:
    gate = asyncio.Event()

    async def body(report: JobReport) -> None:
        for value in (10.0, 40.0, 20.0, 140.0):
            report.advance(value)
            seen.append(report.progress)
        await gate.wait()

    seen: list[float] = []
    job = job_of(body)
    assert job.status("evsys") == job.status("evsys")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert seen == [10.0, 40.0, 40.0, 100.0]
    gate.set()
    await job.wait()
    first = job.status("evsys")
    await asyncio.sleep(0.12)
    assert job.status("evsys") == first
    assert first.status is TrainingStatusEnum.COMPLETED
    assert first.progress == 100.0
    job.cancel()
    await asyncio.sleep(0)
    assert job.status("evsys") == first


async def test_a_failing_end_hook_keeps_no_one_waiting() -> None:
    def hook(job: TrainingJob) -> None:
        raise OSError("ledger disk is full")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    job = TrainingJob("run", Work(nothing), asyncio.Lock(), on_end=hook)
    assert await job.wait(1)
    assert job.state is TrainingStatusEnum.COMPLETED


async def test_uninterrupted_work_ends_before_the_cancellation_takes_effect() -> None:
    trace: list[str] = []

    async def pair() -> str:
        trace.append("forward_backward")
        await asyncio.sleep(0.05)
        trace.append("optim_step")
        return "done"

    task = asyncio.create_task(uninterrupted(pair()))
    await asyncio.sleep(0.01)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trace == ["forward_backward", "optim_step"]
    assert await uninterrupted(pair()) == "done"


async def test_an_error_of_uninterrupted_work_wins_over_the_cancellation() -> None:
    async def fails() -> None:
        await asyncio.sleep(0.02)
        raise ValueError("broken")

    task = asyncio.create_task(uninterrupted(fails()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(ValueError, match="broken"):
        await task
