"""How a rollout ends that is cancelled from within, or from outside."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from nat.runtime.runner import RunnerState

from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.workflow.sessions import RecordedRunner, Rollouts
from nat_plugin_evsys.policy.recorder import Recorder


class Workflow:
    """A workflow that waits for a future which somebody cancels."""

    def __init__(self) -> None:
        self.future = asyncio.get_running_loop().create_future()
        self._state = RunnerState.RUNNING

    async def result(self) -> Any:
        return await self.future


def recorded(workflow: Any) -> tuple[Rollouts, RecordedRunner]:
    rollouts = Rollouts("epoch-0000", "rollout", 0, Recorder(), RunExporters({}))
    return rollouts, RecordedRunner(workflow, rollouts, "run")


async def test_a_cancellation_within_the_workflow_is_its_error() -> None:
    workflow = Workflow()
    rollouts, runner = recorded(workflow)
    workflow.future.cancel()
    assert await runner.result() == ""
    assert "asyncio.CancelledError" in str(rollouts.failures["run"])
    assert (rollouts.done, workflow._state) == (1, RunnerState.FAILED)


async def test_a_cancellation_of_the_rollout_is_none() -> None:
    rollouts, runner = recorded(Workflow())
    task = asyncio.create_task(runner.result())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (rollouts.done, rollouts.failures) == (0, {})
