"""The page on NAT's ART trainer adapter: each attribute, property and method of it, called as it is written there."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from nat.data_models.finetuning import (
    FinetuneConfig,
    TrainingJobRef,
    TrainingJobStatus,
    TrainingStatusEnum,
)
from nat.finetuning.interfaces.trainer_adapter import TrainerAdapter

from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter

Fixture = Any

SIGNATURES = {
    "initialize": "(self, run_config)",
    "is_healthy": "(self)",
    "_validate_episode_order": "(self, traj)",
    "_construct_trajectory_groups": "(self, trajectory_lists)",
    "submit": "(self, trajectories)",
    "status": "(self, ref)",
    "wait_until_complete": "(self, ref, poll_interval=10.0)",
}


@pytest.mark.parametrize(("name", "written"), SIGNATURES.items())
def test_the_signature_is_that_of_the_page(name: str, written: str) -> None:
    """More parameters only after those of the page, and with defaults."""
    method = getattr(EvsysTrainerAdapter, name)
    assert inspect.iscoroutinefunction(method)
    parameters = inspect.signature(method).parameters.values()
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    count = written.count(",") + 1
    assert str(inspect.Signature(bare[:count])) == written
    assert all(each.default is not each.empty for each in bare[count:])


async def test_a_job_by_the_names_of_the_page(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, learning_rate=3e-4)
    assert isinstance(adapter, TrainerAdapter)
    assert adapter.adapter_config.learning_rate == 3e-4
    await adapter.initialize(run_config=FinetuneConfig())
    assert adapter.remote_backend is policy.backend
    assert adapter.model is policy
    assert adapter._model_internal_config["learning_rate"] == 3e-4
    assert await adapter.is_healthy() is True
    collection = await policy.collection()
    for trajectory in (each for row in collection.trajectories for each in row):
        await adapter._validate_episode_order(traj=trajectory)
    groups = await adapter._construct_trajectory_groups(trajectory_lists=collection.trajectories)
    assert [len(group.rewards_G) for group in groups] == [len(row) for row in collection.trajectories]

    ref = await adapter.submit(trajectories=collection)
    assert isinstance(ref, TrainingJobRef)
    assert isinstance(await adapter.status(ref=ref), TrainingJobStatus)
    done = await adapter.wait_until_complete(ref=ref, poll_interval=1.0)
    assert done.status == TrainingStatusEnum.COMPLETED
    assert list(adapter._training_jobs) == list(adapter.training_jobs) == [ref.metadata["job_id"]]
    assert adapter._training_jobs[ref.metadata["job_id"]].done()
