"""Jobs through the adapter: states, progress, failure, cancelling, several submits."""

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from job_phase import until_computing
from nat.data_models.finetuning import (
    FinetuneConfig,
    RewardFunctionConfig,
    TrainingJobRef,
    TrainingStatusEnum,
    TrajectoryCollection,
)

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.errors import EngineClosedError, ModelError
from nat_plugin_evsys.finetuning.job_queue import JobQueue
from nat_plugin_evsys.json_lines import read_json_lines
from nat_plugin_evsys.training import loop
from nat_plugin_evsys.training.job_report import Account, JobReport

Fixture = Any


def with_call_field(collection: TrajectoryCollection, **fields: Any) -> TrajectoryCollection:
    """A copy whose very first call is changed."""
    copy = collection.model_copy(deep=True)
    metadata = copy.trajectories[0][0].metadata
    assert metadata is not None
    metadata["calls"][0] |= fields
    return copy


def balanced(metadata: dict[str, Any]) -> bool:
    return metadata["calls"] == metadata["trained"] + sum(metadata["dropped"].values())


async def test_initialize_loads_the_policy_and_takes_the_run_config(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    assert policy.client is None
    config = FinetuneConfig(reward_function=RewardFunctionConfig(name="accuracy"))
    await adapter.initialize(config)
    assert adapter.run_config is config
    assert adapter.adapter_config.reward.name == "accuracy"
    assert policy.client is not None
    assert await adapter.is_healthy()


async def test_health_is_really_asked(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    adapter.health_timeout = 0.05
    policy.health = lambda: asyncio.sleep(10, True)
    started = time.monotonic()
    assert not await adapter.is_healthy()
    assert time.monotonic() - started < 2
    policy.health = policy.backend.is_healthy
    adapter.health_timeout = 10
    assert await adapter.is_healthy()
    await policy.ensure_loaded()
    await policy.backend.close()
    assert not await adapter.is_healthy()
    with pytest.raises(ModelError, match="backend of policy `policy`"):
        await adapter.initialize(FinetuneConfig())


async def test_a_health_check_that_raises_is_unhealthy(
    policy: Fixture, make_adapter: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> bool:
        raise ConnectionError("gone")

    policy.health = broken
    assert not await make_adapter(policy).is_healthy()
    assert "ConnectionError: gone" in caplog.text


async def test_submit_returns_at_once_and_the_job_completes(
    policy: Fixture, make_adapter: Fixture, tmp_path: Path
) -> None:
    collection = await policy.collection(groups=3)
    adapter = make_adapter(policy, groups_per_step=1)
    policy.backend.gate.clear()
    ref = await adapter.submit(collection, epoch=2)
    assert (ref.run_id, ref.backend) == ("run", "evsys")
    assert ref.metadata is not None
    assert ref.metadata["epoch"] == 2
    assert list(adapter.training_jobs) == [ref.metadata["job_id"]]
    assert not adapter.training_jobs[ref.metadata["job_id"]].done()

    pending = await adapter.status(ref)
    assert (pending.status, pending.progress) == (TrainingStatusEnum.PENDING, 0.0)
    assert await adapter.status(ref) == pending
    policy.backend.gate.set()
    done = await adapter.wait_until_complete(ref)
    assert (done.status, done.progress) == (TrainingStatusEnum.COMPLETED, 100.0)
    metadata = done.metadata
    assert metadata is not None
    assert (metadata["phase"], metadata["step"], metadata["steps"]) == ("done", 3, 3)
    assert (metadata["calls"], metadata["trained"], metadata["dropped"]) == (12, 12, {})
    assert metadata["trajectories"] == {"trained": 12, "dropped": {}}
    assert metadata["policy_version"] == policy.client.policy_version == 3
    assert metadata["metrics"]["sampled_tokens"] == 12 * 6
    assert metadata["metrics"]["grad_norm"] > 0
    assert metadata["tokens_per_second"] > 0
    assert "seconds_since_heartbeat" not in metadata

    await asyncio.sleep(0.15)
    assert await adapter.status(ref) == done
    assert await adapter.wait_until_complete(ref) == done
    submitted, finished = read_json_lines(tmp_path / "run" / "jobs.jsonl")
    assert (submitted["event"], submitted["calls"], submitted["epoch"]) == ("submitted", 12, 2)
    assert (finished["event"], finished["status"], finished["trained"]) == ("finished", "completed", 12)
    assert submitted["job_id"] == finished["job_id"] == ref.metadata["job_id"]


async def test_status_shows_growing_progress_within_one_step(
    policy: Fixture, make_adapter: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "POLL_SECONDS", 0.002)
    policy.backend._model.token_budget = 8  # a micro-batch per Datum
    adapter = make_adapter(policy, groups_per_step=20)
    ref = await adapter.submit(await policy.collection(groups=20))
    seen: list[Any] = []
    while (status := await adapter.status(ref)).status in (TrainingStatusEnum.PENDING, TrainingStatusEnum.RUNNING):
        seen.append(status)
        await asyncio.sleep(0.002)
    values = [status.progress for status in seen]
    assert values == sorted(values)
    in_step = [s for s in seen if s.metadata["phase"] == "forward_backward"]
    assert len({status.progress for status in in_step}) >= 4
    assert all(0 <= s.progress <= 100 and s.metadata["seconds_since_heartbeat"] >= 0 for s in in_step)
    assert {(s.metadata["step"], s.metadata["steps"]) for s in in_step} == {(1, 1)}
    assert (await adapter.status(ref)).progress == 100.0


async def test_heartbeat_tells_a_stuck_job(policy: Fixture, make_adapter: Fixture) -> None:
    policy.backend.gate.clear()
    adapter = make_adapter(policy)
    ref = await adapter.submit(await policy.collection())
    await until_computing(adapter, ref)
    await asyncio.sleep(0.4)
    stuck = await adapter.status(ref)
    assert stuck.status is TrainingStatusEnum.RUNNING
    assert stuck.metadata is not None
    assert stuck.metadata["phase"] == "forward_backward"
    assert stuck.metadata["seconds_since_heartbeat"] >= 0.3
    policy.backend.gate.set()
    assert (await adapter.wait_until_complete(ref)).status is TrainingStatusEnum.COMPLETED


async def test_wait_wakes_at_once_and_logs_at_the_poll_interval(
    policy: Fixture, make_adapter: Fixture, tmp_path: Path
) -> None:
    adapter = make_adapter(policy)
    started = time.monotonic()
    await adapter.wait_until_complete(await adapter.submit(await policy.collection()), poll_interval=600.0)
    assert time.monotonic() - started < 10
    log = tmp_path / "run" / "trainer_adapter.jsonl"
    assert not log.exists()

    policy.backend.gate.clear()
    ref = await adapter.submit(await policy.collection())
    await until_computing(adapter, ref)
    waiting = asyncio.create_task(adapter.wait_until_complete(ref, poll_interval=0.05))
    await asyncio.sleep(0.4)
    lines = read_json_lines(log)
    assert 2 <= len(lines) <= 8
    assert lines[-1]["job_id"] == ref.metadata["job_id"]
    assert (lines[-1]["status"], lines[-1]["phase"]) == ("running", "forward_backward")
    waiting.cancel()  # giving up the wait leaves the job alone
    policy.backend.gate.set()
    assert (await adapter.wait_until_complete(ref)).status is TrainingStatusEnum.COMPLETED
    with pytest.raises(ValueError, match="poll_interval is 0"):
        await adapter.wait_until_complete(ref, poll_interval=0)


async def test_two_submits_of_one_run_are_two_jobs(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    collection = await policy.collection()
    policy.backend.gate.clear()
    first, second = await adapter.submit(collection), await adapter.submit(collection)
    assert first.metadata["job_id"] != second.metadata["job_id"]
    await until_computing(adapter, first)
    assert (await adapter.status(first)).status is TrainingStatusEnum.RUNNING
    assert (await adapter.status(second)).status is TrainingStatusEnum.PENDING
    latest = await adapter.status(TrainingJobRef(run_id="run", backend="evsys"))
    assert latest.metadata["job_id"] == second.metadata["job_id"]
    policy.backend.gate.set()
    after_second = await adapter.wait_until_complete(second)
    after_first = await adapter.status(first)
    assert after_first.status is after_second.status is TrainingStatusEnum.COMPLETED
    assert [after_first.metadata["policy_version"], after_second.metadata["policy_version"]] == [1, 2]
    assert policy.backend.step == 2


async def test_a_job_that_cannot_be_recorded_is_not_begun(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    collection = await policy.collection()
    adapter.run_dir.parent.mkdir(exist_ok=True)
    adapter.run_dir.write_text("no directory")
    with pytest.raises(FileExistsError):
        await adapter.submit(collection)
    await adapter.close()
    assert policy.backend.step == 0
    assert [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("training-job")] == []


async def test_unknown_jobs_are_named_with_what_is_known(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    ref = await adapter.submit(await policy.collection())
    for wrong in (
        TrainingJobRef(run_id="other", backend="evsys"),
        TrainingJobRef(run_id="run", backend="evsys", metadata={"job_id": "nope"}),
        TrainingJobRef(run_id="run", backend="openpipe", metadata=ref.metadata),
    ):
        for ask in (adapter.status, adapter.wait_until_complete, adapter.cancel):
            with pytest.raises(ValueError, match=ref.metadata["job_id"]):
                await ask(wrong)


async def test_a_failing_loss_gives_failed_with_the_cause(
    policy: Fixture, make_adapter: Fixture, tmp_path: Path
) -> None:
    good = await policy.collection()
    bad = with_call_field(good, output_ids=[31, 32, 1, 2, 3, 4])
    adapter = make_adapter(policy, groups_per_step=1, shuffle_seed=3)
    ref = await adapter.submit(bad)
    status = await adapter.wait_until_complete(ref)
    assert status.status is TrainingStatusEnum.FAILED
    assert "forward_backward of step" in status.message
    assert "is 32; token ids are 0 to 31" in status.message
    assert status.metadata["error_type"] == "DataError"
    assert status.metadata["policy_version"] is None
    assert balanced(status.metadata)
    assert status.metadata["dropped"]["job_failed"] >= 4
    assert await adapter.status(ref) == status
    assert read_json_lines(tmp_path / "run" / "jobs.jsonl")[-1]["status"] == "failed"
    assert (await adapter.wait_until_complete(await adapter.submit(good))).status is TrainingStatusEnum.COMPLETED


async def test_a_loss_that_is_not_finite_fails_and_leaks_nothing_into_the_next_job(
    make_policy: Fixture, make_adapter: Fixture
) -> None:
    policy, untouched = make_policy(), make_policy()
    good = await policy.collection()
    # exp(lp + 200) overflows fp32, so the importance ratio is inf.
    bad = with_call_field(good, logprobs=[-200.0] * 6)
    adapter = make_adapter(policy)
    before = policy.weights()
    status = await adapter.wait_until_complete(await adapter.submit(bad))
    assert status.status is TrainingStatusEnum.FAILED
    assert "step 1/1: the loss (`loss:sum`) is" in status.message
    assert status.metadata["error_type"] == "JobError"
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.weights().items())

    await adapter.wait_until_complete(await adapter.submit(good))
    other = make_adapter(untouched)
    await other.wait_until_complete(await other.submit(good))
    expected = untouched.weights()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in policy.weights().items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("through", ["adapter", "task"])
async def test_cancel_takes_effect_at_the_border_of_a_step(
    policy: Fixture, make_adapter: Fixture, through: str
) -> None:
    adapter = make_adapter(policy, groups_per_step=1)
    collection = await policy.collection(groups=4)
    policy.backend.gate.clear()
    ref = await adapter.submit(collection)
    await until_computing(adapter, ref)
    if through == "adapter":
        status = await adapter.cancel(ref)
        assert status.status is TrainingStatusEnum.RUNNING
        assert "cancel requested" in status.message
    else:
        adapter.training_jobs[ref.metadata["job_id"]].cancel()
    await asyncio.sleep(0.05)
    assert (await adapter.status(ref)).status is TrainingStatusEnum.RUNNING
    policy.backend.gate.set()
    status = await adapter.wait_until_complete(ref)
    assert status.status is TrainingStatusEnum.CANCELED
    assert status.message == "canceled after optim_step of step 1/4"
    assert policy.backend.step == 1
    assert policy.backend._model.gradient is None
    assert policy.backend.policy_version == 0  # nothing was published
    assert (status.metadata["trained"], status.metadata["dropped"]) == (4, {"job_canceled": 12})
    assert await adapter.status(ref) == await adapter.cancel(ref) == status
    assert (await adapter.wait_until_complete(await adapter.submit(collection))).status is TrainingStatusEnum.COMPLETED


async def test_a_pending_job_is_cancelled_at_once(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    collection = await policy.collection()
    policy.backend.gate.clear()
    running, pending, last = [await adapter.submit(collection) for _ in range(3)]
    status = await adapter.cancel(pending)
    assert (status.status, status.metadata["dropped"]) == (TrainingStatusEnum.CANCELED, {"job_canceled": 8})
    assert status.metadata["trajectories"] == {"trained": 0, "dropped": {"job_canceled": 8}}
    policy.backend.gate.set()
    assert (await adapter.wait_until_complete(last)).status is TrainingStatusEnum.COMPLETED
    assert (await adapter.status(running)).status is TrainingStatusEnum.COMPLETED
    assert policy.backend.step == 2


async def test_close_ends_every_job_and_refuses_new_ones(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, groups_per_step=1)
    collection = await policy.collection()
    policy.backend.gate.clear()
    refs = [await adapter.submit(collection) for _ in range(3)]
    await until_computing(adapter, refs[0])
    closing = asyncio.create_task(adapter.close())
    await asyncio.sleep(0.05)
    policy.backend.gate.set()
    await closing
    assert [(await adapter.status(ref)).status for ref in refs] == [TrainingStatusEnum.CANCELED] * 3
    assert all(task.done() for task in adapter.training_jobs.values())
    assert policy.backend.step == 1
    assert await policy.backend.is_healthy()
    with pytest.raises(EngineClosedError, match="closed"):
        await adapter.submit(collection)


async def test_a_queue_keeps_the_newest_ended_jobs_and_all_open_ones() -> None:
    class Work:
        async def run(self, report: JobReport) -> None:
            await gate.wait()

        def account(self, lost_reason: DropReason) -> Account:
            return Account()

    gate, queue = asyncio.Event(), JobQueue(keep_ended=2)
    open_jobs = [queue.start("run", cast(Any, Work()), {}, None, run_dir=None, save_datums=False) for _ in range(5)]
    assert list(queue.tasks) == [job.job_id for job in open_jobs]
    gate.set()
    for job in open_jobs:
        await job.wait()
    newest = queue.start("run", cast(Any, Work()), {}, None, run_dir=None, save_datums=False)
    assert list(queue.tasks) == [job.job_id for job in [*open_jobs[-2:], newest]]
    await newest.wait()
    forgotten = TrainingJobRef(run_id="run", backend="evsys", metadata={"job_id": open_jobs[0].job_id})
    with pytest.raises(ValueError, match="no training job"):
        queue.find(forgotten)


async def test_log_progress_appends_a_json_line(policy: Fixture, make_adapter: Fixture, tmp_path: Path) -> None:
    adapter = make_adapter(policy)
    ref = TrainingJobRef(run_id="run", backend="evsys", metadata={"job_id": "j"})
    adapter.log_progress(ref, {"loss": 1.5})
    adapter.log_progress(ref, {"loss": float("nan")}, output_dir=str(tmp_path / "elsewhere"))
    assert read_json_lines(tmp_path / "run" / "trainer_adapter.jsonl") == [
        {"run_id": "run", "job_id": "j", "loss": 1.5}
    ]
    (elsewhere,) = read_json_lines(tmp_path / "elsewhere" / "trainer_adapter.jsonl")
    assert (elsewhere["loss"], elsewhere["non_finite"]) == (None, {"loss": "nan"})
    adapter.run_dir = None
    adapter.log_progress(ref, {"loss": 2.0})
