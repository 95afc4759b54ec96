"""NAT's DPO trajectories through the adapter: trained with the loss of ``algorithms/dpo``, as a job like any other."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from job_phase import until_computing
from nat.data_models.finetuning import (
    DPOItem,
    EpisodeItem,
    EpisodeItemRole,
    OpenAIMessage,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from pydantic import ValidationError

from nat_plugin_evsys.config import EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.json_lines import read_json_lines
from nat_plugin_evsys.training.dpo import REFERENCE, build_dpo_pairs, train_dpo

Fixture = Any

ITEMS = [
    DPOItem(prompt="star", chosen_response="sun", rejected_response="themoon"),
    DPOItem(
        prompt=[OpenAIMessage(role="user", content="hi"), OpenAIMessage(role="assistant", content="yo")],
        chosen_response="goodday",
        rejected_response="what",
    ),
    DPOItem(prompt="colour", chosen_response="blue", rejected_response="red"),
    DPOItem(prompt="animal", chosen_response="cat", rejected_response="dog"),
]


def trajectory(*items: Any) -> Trajectory:
    return Trajectory(episode=list(items), reward=1.0)


def collection(*rows: list[Trajectory]) -> TrajectoryCollection:
    return TrajectoryCollection(trajectories=list(rows), run_id="run")


def preferences() -> TrajectoryCollection:
    """Three trajectories in two rows: pairs 0 and 1, pair 2, pair 3."""
    return collection([trajectory(*ITEMS[:2]), trajectory(ITEMS[2])], [], [trajectory(ITEMS[3])])


async def log_ratios(policy: Fixture) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of every item under the policy's present weights."""
    renderer = policy.renderer
    data = [datum for pair in build_dpo_pairs(ITEMS, renderer.render, renderer.render_reply) for datum in pair]
    outputs = (await policy.backend.forward_async(data, loss_fn="cross_entropy")).loss_fn_outputs
    sums = [
        (output["logprobs"].to_torch().double() * datum.loss_fn_inputs["weights"].to_torch()).sum()
        for datum, output in zip(data, outputs, strict=True)
    ]
    return torch.stack(sums[::2]) - torch.stack(sums[1::2])


async def test_a_job_raises_the_margin_and_publishes(policy: Fixture, make_adapter: Fixture, tmp_path: Path) -> None:
    await policy.ensure_loaded()
    before = await log_ratios(policy)
    adapter = make_adapter(policy, learning_rate=1e-2, passes=6, dpo_batch_size=3, dpo_beta=0.5, save_datums=True)
    ref = await adapter.submit(preferences(), epoch=2)
    assert (await adapter.status(ref)).status is TrainingStatusEnum.PENDING
    status = await adapter.wait_until_complete(ref)
    assert (status.status, status.progress, status.message) == (TrainingStatusEnum.COMPLETED, 100.0, None)
    gained = await log_ratios(policy) - before
    assert (gained > 0.5).all()

    metadata = status.metadata
    assert (metadata["phase"], metadata["step"], metadata["steps"], metadata["epoch"]) == ("done", 12, 12, 2)
    assert (metadata["calls"], metadata["trained"], metadata["dropped"]) == (0, 0, {})
    assert metadata["trajectories"] == {"trained": 3, "dropped": {}}
    assert metadata["policy_version"] == policy.client.policy_version == 12
    assert metadata["tokens_per_second"] > 0
    metrics = metadata["metrics"]
    assert 0 < metrics["loss:mean"] < math.log(2)
    assert metrics["loss:sum"] == pytest.approx(metrics["loss:mean"] * 24, rel=1e-5)  # 4 pairs, 6 passes
    assert metrics["margin:mean"] > 0
    assert metrics["sampled_tokens"] == 6 * sum(
        len(item.chosen_response) + len(item.rejected_response) + 2 for item in ITEMS
    )
    assert await adapter.status(ref) == status

    submitted, finished = read_json_lines(tmp_path / "run" / "jobs.jsonl")
    sizes = {key: submitted[key] for key in ("groups", "trajectories", "calls", "pairs")}
    assert sizes == {"groups": 2, "trajectories": 3, "calls": 0, "pairs": 4}
    assert (finished["status"], finished["trajectories"]) == ("completed", {"trained": 3, "dropped": {}})
    logged = read_json_lines(tmp_path / "run" / f"datums-{metadata['job_id']}.jsonl")
    places = [(r["group"], r["trajectory"], r["item"], r["response"]) for r in logged]
    where = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (2, 0, 0)]
    assert sorted(places) == [(*place, response) for place in where for response in ("chosen", "rejected")]
    assert all(len(r[REFERENCE]) == len(r["model_input"]) == len(r["target_tokens"]) for r in logged)


async def test_a_step_is_that_of_train_dpo(make_policy: Fixture, make_adapter: Fixture) -> None:
    policy, other = make_policy(), make_policy()
    adapter = make_adapter(policy, learning_rate=1e-3, lr_warmup=0, dpo_beta=0.3)
    status = await adapter.wait_until_complete(await adapter.submit(preferences()))
    assert status.metadata["steps"] == 1
    pairs = build_dpo_pairs(ITEMS, other.renderer.render, other.renderer.render_reply)
    (step,) = await train_dpo(other.backend, pairs, epochs=1, batch_size=8, learning_rate=1e-3, beta=0.3)
    assert status.metadata["metrics"]["loss:mean"] == pytest.approx(step.loss)
    assert status.metadata["metrics"]["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-4)
    await policy.ensure_loaded()
    assert torch.allclose(await log_ratios(policy), await log_ratios(other), atol=1e-3)
    assert status.metadata["loss"] == pytest.approx(4 * math.log(2), abs=1e-4)


async def test_status_while_it_runs(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, dpo_batch_size=1)
    policy.backend.gate.clear()
    ref = await adapter.submit(preferences())
    await until_computing(adapter, ref)
    await asyncio.sleep(0.2)
    running = await adapter.status(ref)
    assert running.status is TrainingStatusEnum.RUNNING
    assert (running.metadata["phase"], running.metadata["step"], running.metadata["steps"]) == (
        "forward_backward",
        1,
        4,
    )
    assert running.metadata["seconds_since_heartbeat"] >= 0.1
    policy.backend.gate.set()
    seen = [running.progress]
    while (status := await adapter.status(ref)).status is TrainingStatusEnum.RUNNING:
        seen.append(status.progress)
        await asyncio.sleep(0.002)
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3
    assert status.status is TrainingStatusEnum.COMPLETED


async def test_a_collection_is_of_one_kind(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    user = EpisodeItem(role=EpisodeItemRole.USER, content="x")
    reply = EpisodeItem(role=EpisodeItemRole.ASSISTANT, content="y", logprobs=[])
    pair, roles = trajectory(ITEMS[0]), trajectory(user, reply)
    with pytest.raises(ValueError, match=r"trajectory 1 of group 0, item 0: an item with a role \(`user`\)"):
        await adapter.submit(collection([pair, roles]))
    with pytest.raises(ValueError, match="trajectory 0 of group 0, item 0: an item with a role"):
        await adapter.submit(collection([roles], [pair]))
    with pytest.raises(ValueError, match="trajectory 0 of group 1: the episode is empty"):
        await adapter.submit(collection([pair], [trajectory()]))
    assert adapter.training_jobs == {}


async def test_settings_without_effect_on_pairs_are_refused(policy: Fixture, make_adapter: Fixture) -> None:
    with pytest.raises(ConfigError, match="for which loss_fn, groups_per_step would have no effect"):
        await make_adapter(policy, loss_fn="ppo", groups_per_step=2).submit(preferences())
    for wrong in ({"dpo_beta": 0.0}, {"dpo_beta": math.inf}, {"dpo_batch_size": 0}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            EvsysTrainerAdapterConfig(policy="policy", **wrong)


async def test_a_failing_job_names_the_first_cause(policy: Fixture, make_adapter: Fixture, tmp_path: Path) -> None:
    adapter = make_adapter(policy)
    same = DPOItem(prompt="x", chosen_response="a", rejected_response="a")
    status = await adapter.wait_until_complete(
        await adapter.submit(collection([trajectory(ITEMS[0]), trajectory(ITEMS[1], same)]))
    )
    assert status.status is TrainingStatusEnum.FAILED
    assert status.message.startswith("preparing failed: trajectory 1 of group 0: items[1]: the chosen and the rejected")
    assert status.metadata["error_type"] == "DataError"
    assert status.metadata["trajectories"] == {"trained": 0, "dropped": {"job_failed": 2}}
    assert status.metadata["policy_version"] is None
    assert read_json_lines(tmp_path / "run" / "jobs.jsonl")[-1]["status"] == "failed"
    done = await adapter.wait_until_complete(await adapter.submit(preferences()))
    assert done.status is TrainingStatusEnum.COMPLETED


async def test_a_loss_that_is_not_finite_fails_the_job(policy: Fixture, make_adapter: Fixture) -> None:
    await policy.ensure_loaded()
    with torch.no_grad():
        for _, b in policy.backend._model.adapter.weights.values():
            b.fill_(math.nan)
    adapter = make_adapter(policy)
    status = await adapter.wait_until_complete(await adapter.submit(preferences()))
    assert status.status is TrainingStatusEnum.FAILED
    assert "forward_backward of step 1/1 failed" in status.message
    assert "the custom loss is inf or NaN" in status.message
    assert policy.backend._model.gradient is None
    assert policy.backend.step == 0


async def test_cancel_takes_effect_at_the_border_of_a_step(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, dpo_batch_size=1)
    policy.backend.gate.clear()
    ref, pending = await adapter.submit(preferences()), await adapter.submit(preferences())
    await until_computing(adapter, ref)
    assert (await adapter.cancel(pending)).metadata["trajectories"]["dropped"] == {"job_canceled": 3}
    assert "cancel requested" in (await adapter.cancel(ref)).message
    policy.backend.gate.set()
    status = await adapter.wait_until_complete(ref)
    assert status.status is TrainingStatusEnum.CANCELED
    assert status.message == "canceled after optim_step of step 1/4"
    assert status.metadata["trajectories"] == {"trained": 1, "dropped": {"job_canceled": 2}}
    assert policy.backend.step == 1
    assert policy.backend._model.gradient is None
    assert policy.backend.policy_version == 0  # nothing was published
    done = await adapter.wait_until_complete(await adapter.submit(preferences()))
    assert done.status is TrainingStatusEnum.COMPLETED
