"""Reinforcement learning on a Backend: every loss raises the reward; what is left out is counted; runs repeat."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tinker import types

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.advantages import group_advantages
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import RlIteration, train_rl
from nat_plugin_evsys.training.step_size import StepSize

ROWS = ["alpha", "beta", "gamma", "delta"]
ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def settings_of(loss_fn: Any = "importance_sampling", **options: Any) -> TrainingSettings:
    return TrainingSettings(**{"loss_fn": loss_fn, "adam": ADAM, **options})


def letters(row: str, text: str) -> float:
    """Share of the reply that is printable ASCII: dense, and at random about 0.37."""
    return sum(" " <= c <= "~" for c in text) / max(len(text), 1)


@pytest.fixture
def train(make_backend: Any, render: Any) -> Any:
    async def run(backend: Any = None, **options: Any) -> list[RlIteration]:
        defaults: dict[str, Any] = {
            "render": lambda row: render([{"role": "user", "content": row}]),
            "reward": letters,
            "settings": settings_of(),
            "epochs": 6,
            "batch_size": 4,
            "group_size": 8,
            "sampling": types.SamplingParams(max_tokens=6, stop=[]),
        }
        return await train_rl(
            backend or await make_backend(train_unembed=True), **{"rows": ROWS, **defaults, **options}
        )

    return run


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
async def test_every_loss_raises_the_reward(loss_fn: str, train: Any) -> None:
    history = await train(settings=settings_of(loss_fn), epochs=10, group_size=16)
    assert [i.iteration for i in history] == list(range(1, 11))
    assert [i.policy_version for i in history] == list(range(10))
    assert all(len(i.steps) == 1 and i.trajectories == 64 for i in history)
    assert history[0].steps[0]["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert history[-1].reward_mean > history[0].reward_mean + 0.2


async def test_runs_repeat(train: Any, make_backend: Any) -> None:
    """Row by row, so that all sums are taken alike: how concurrent requests share a batch depends on the clock."""

    async def outputs(seed: int) -> tuple[list[list[int]], list[float]]:
        tokens: list[list[int]] = []

        def collect(record: RlIteration, groups: list[TrajectoryGroup]) -> None:
            tokens.extend(call.output_ids for group in groups for (call,) in group.calls_G)

        backend = await make_backend(train_unembed=True, max_batch_size=1)
        history = await train(backend, epochs=3, seed=seed, on_iteration=collect)
        return tokens, [i.steps[0]["grad_norm"] for i in history]

    (first, norms), (again, norms_again), (other, _) = [await outputs(seed) for seed in (1, 1, 2)]
    assert first == again
    assert norms == pytest.approx(norms_again, rel=1e-3)
    assert other != first


async def test_groups_carry_the_exact_tokens_and_their_advantages(train: Any, make_backend: Any, render: Any) -> None:
    backend = await make_backend(perturbed=True)
    seen: list[tuple[RlIteration, list[TrajectoryGroup]]] = []
    history = await train(backend, epochs=1, batch_size=3, on_iteration=lambda *args: seen.append(args))
    assert [i for i, _ in seen] == history
    assert [i.trajectories for i in history] == [24, 8]
    (record, groups) = seen[0]
    first = groups[0].calls_G[0][0]
    assert first.policy_version == record.policy_version == 0
    assert first.prompt_ids in [render([{"role": "user", "content": row}]) for row in ROWS]
    assert all(len(c.output_ids) == len(c.logprobs) == 6 for g in groups for (c,) in g.calls_G)
    assert len({tuple(c.output_ids) for g in groups for (c,) in g.calls_G}) == 24
    # At the weights that sampled, the ratio is 1, so the loss is minus the sum of the advantages.
    advantages = [a for g in groups for a in group_advantages(g.rewards_G, "group_mean")]
    assert record.steps[0]["loss:sum"] == pytest.approx(-6 * sum(advantages), abs=1e-4)
    assert record.steps[0]["tokens:sum"] == sum(6 for a in advantages if a != 0)


async def test_equal_rewards_train_nothing_and_are_counted(train: Any, make_backend: Any) -> None:
    backend = await make_backend()
    history = await train(backend, reward=lambda row, text: 1.0, epochs=1)
    assert history[0].steps == []
    assert history[0].dropped == {"zero_variance_group": 32}
    assert backend.step == 0


async def test_passes_and_groups_per_step_make_more_steps(train: Any, make_backend: Any) -> None:
    backend = await make_backend()
    history = await train(backend, settings=settings_of("ppo", passes=2, groups_per_step=3), epochs=1)
    assert len(history[0].steps) == backend.step == 4
    assert history[0].steps[0]["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert history[0].steps[-1]["ratio:mean"] != pytest.approx(1.0, abs=1e-4)


async def test_the_schedule_is_over_all_iterations(train: Any) -> None:
    settings = settings_of(rate=LearningRate(1e-2, "linear"), groups_per_step=2, step_size=StepSize(warmup=3))
    history = await train(settings=settings, epochs=4)
    rates = [step["learning_rate"] for iteration in history for step in iteration.steps]
    assert [round(1e2 * rate, 3) for rate in rates] == [0.333, 0.583, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


async def test_a_reward_may_be_a_coroutine_and_must_be_finite(train: Any) -> None:
    async def slow(row: str, text: str) -> float:
        return ROWS.index(row) / 4

    (first,) = await train(reward=slow, epochs=1)
    assert first.reward_mean == 0.375
    with pytest.raises(DataError, match="the reward of reply 0 is nan"):
        await train(reward=lambda row, text: float("nan"))
    with pytest.raises(DataError, match="the reward of reply 0 is None"):
        await train(reward=lambda row, text: None)


async def test_cancelling_leaves_the_backend_usable_and_without_gradient(train: Any, make_backend: Any) -> None:
    backend = await make_backend(train_unembed=True)
    task = asyncio.create_task(train(backend, epochs=1000))
    for _ in range(10_000):
        if backend.step >= 2:
            break
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # What was submitted runs to its end behind the cancellation: either both of the pair or neither.
    assert (await train(backend, epochs=1))[0].steps[0]["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert backend._model.gradient is None


@pytest.mark.parametrize(
    "wrong",
    [{"group_size": 0}, {"epochs": 0}, {"batch_size": 0}, {"sampling": types.SamplingParams(max_tokens=2, seed=1)}],
)
async def test_bad_rl_settings(wrong: dict[str, Any], train: Any) -> None:
    with pytest.raises(ConfigError, match="rl needs"):
        await train(**wrong)
    with pytest.raises(DataError, match="no rows"):
        await train(rows=[])
