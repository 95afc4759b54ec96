"""The learning rate falls while the policy moves further than it should, and rises again below."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from groups import GROUPS, make_group, steps_of
from tinker import types

from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.group_material import GroupMaterial
from nat_plugin_evsys.training.job_report import JobReport
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.loop import Taken, run_steps
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, policy_gradient_steps
from nat_plugin_evsys.training.step_metrics import StepMetrics
from nat_plugin_evsys.training.step_size import LEAST, StepSize, unsolved_factor, warmup_of


def test_the_factor_by_hand() -> None:
    def after(*kls: float, target: float | None = 0.2) -> float:
        size = StepSize(target)
        for kl in kls:
            size.observe(kl)
        return size.factor

    assert after(0.4) == pytest.approx(0.5), "four times the aim: half the rate"
    assert after(100.0) == 0.25
    assert after(100.0, 0.1) == 0.25, "at the aim nothing changes"
    assert after(100.0, 0.05) == pytest.approx(0.25 * math.sqrt(2))
    assert after(100.0, 0.0) == pytest.approx(0.25 * 1.5)
    assert after(0.0, 1e-9) == 1.0, "the rate that was set is the highest"
    assert after(*[100.0] * 20) == LEAST
    assert after(math.nan, math.inf) == 1.0
    assert after(100.0, target=None) == 1.0


def test_the_rate_rises_over_the_warm_up() -> None:
    size = StepSize(0.2, factor=0.5, warmup=4)
    factors = []
    for _ in range(6):
        factors.append(size.next)
        size.taken += 1
    assert factors == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert StepSize().next == 1.0
    assert [warmup_of(rate) for rate in (1e-5, 1.25e-4, 2e-4, 5e-4, 1e-3, 2e-3, 0.05)] == [1, 1, 2, 4, 8, 16, 16]


def test_the_factor_for_solved_groups_by_hand() -> None:
    assert unsolved_factor(8, with_signal=8, silent=0, solved=0) == 1.0
    assert unsolved_factor(8, with_signal=2, silent=6, solved=0) == 1.0, "the others all failed"
    assert unsolved_factor(8, with_signal=2, silent=6, solved=6) == 0.5
    assert unsolved_factor(8, with_signal=2, silent=6, solved=4) == pytest.approx(math.sqrt(1 / 2))
    assert unsolved_factor(8, with_signal=8, silent=4, solved=4) == 1.0, "a step that is full misses nobody"
    assert unsolved_factor(4, with_signal=0, silent=4, solved=4) == 0.5, "a KL penalty trains on solved groups too"
    assert unsolved_factor(8, with_signal=1, silent=1, solved=1) == pytest.approx(math.sqrt(7 / 8)), "ten groups of 8"


async def test_solved_groups_lower_the_rate_of_the_step_that_misses_them(make_backend: Any) -> None:
    backend = await make_backend()
    groups = [
        make_group("mixed", [1.0, 0.0], 1),
        make_group("solved", [1.0, 1.0], 2),
        make_group("failed", [0.0, 0.0], 3),
        make_group("mixed too", [0.0, 1.0], 4),
    ]

    async def rates(groups: list[TrajectoryGroup] = groups, **settings: Any) -> list[float]:
        steps = await steps_of(backend, groups, adam=types.AdamParams(learning_rate=1.0), **settings)
        return [step.adam.learning_rate for step in steps]

    assert await rates() == [1.0], "by default a step runs at the rate that was set"
    assert await rates(lr_scaling="unsolved") == [pytest.approx(math.sqrt(3 / 4))]
    assert await rates(lr_scaling="unsolved", kl_beta=0.1) == [pytest.approx(math.sqrt(3 / 4))]
    assert await rates(lr_scaling="unsolved", groups_per_step=1) == [1.0, 1.0]
    assert await rates(lr_scaling="unsolved", groups_per_step=64) == [pytest.approx(math.sqrt(3 / 4))]
    most_failed = [*groups[:2], *(make_group(f"failed {n}", [0.0, 0.0], 3) for n in range(6))]
    assert await rates(most_failed, lr_scaling="unsolved", groups_per_step=4) == [
        pytest.approx(math.sqrt((4 - 3 / 7) / 4))
    ], "3 places are empty, and 1 in 7 of the groups without a signal is solved"
    worse = [*groups[:3], make_group("better", [2.0, 1.0], 4)]
    assert await rates(worse, lr_scaling="unsolved") == [1.0], "equal rewards below the highest are nothing solved"
    assert await rates(lr_scaling="unsolved", loss_fn="cross_entropy") == [1.0]
    alike = [make_group(name, [0.0, 0.0], 1) for name in ("a", "b")]
    assert await rates(alike, lr_scaling="unsolved", kl_beta=0.1) == [1.0], "all may have failed"


async def test_a_step_that_moves_too_far_lowers_the_next_rates(make_backend: Any, full_logprobs: Any) -> None:
    backend = await make_backend(perturbed=True)
    size = StepSize(target=1e-3)
    settings = TrainingSettings("ppo", types.AdamParams(learning_rate=0.1), step_size=size)
    factors, rates = [], []
    for _ in range(3):
        report = JobReport()
        material = GroupMaterial([GROUPS[0], GROUPS[2]], settings)
        await material.prepare(backend)
        await run_steps(backend, material.steps(backend), report=report)
        rates.append(report.metrics["learning_rate"])
        factors.append(report.metrics["lr_factor"])
        moved = report.metrics["kl_moved"]
    assert rates == pytest.approx([0.1, 0.1 * factors[0], 0.1 * factors[1]])
    assert factors[0] == 0.25
    assert size.factor == factors[-1] < factors[0]

    gaps = []
    for call in (call for group in (GROUPS[0], GROUPS[2]) for calls in group.calls_G for call in calls):
        rows = full_logprobs(backend, [*call.prompt_ids, *call.output_ids][:-1])[-len(call.output_ids) :]
        lp = rows.gather(1, torch.tensor(call.output_ids)[:, None])[:, 0]
        gaps.append(lp - torch.tensor(call.logprobs, dtype=torch.float32))
    assert moved == pytest.approx(float(torch.cat(gaps).detach().square().mean() / 2), rel=1e-4)


async def test_the_move_of_a_large_step_is_measured_on_some_of_its_replies(
    make_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await make_backend(perturbed=True)
    measured: list[int] = []
    forward = backend.forward_async

    async def counted(data: Any, **others: Any) -> Any:
        measured.append(len(data))
        return await forward(data, **others)

    monkeypatch.setattr(backend, "forward_async", counted)
    groups = [replace(GROUPS[number % 2 * 2], name=f"copy-{number}") for number in range(200)]
    size = StepSize(target=1e3)
    settings = TrainingSettings("ppo", types.AdamParams(learning_rate=0.1), step_size=size)
    sets = build_datums(groups, settings)
    (step,) = await run_steps(backend, policy_gradient_steps(backend, sets, settings))
    assert 8 <= measured[-1] < sum(len(datums.datums) for datums in sets) / 2
    assert step.values["kl_moved"] > 0


async def test_later_steps_see_what_the_earlier_ones_did(make_backend: Any) -> None:
    """Then nothing more is computed: the KL is the largest that a step found on rollouts it had not trained on."""
    backend = await make_backend(perturbed=True)
    size = StepSize(target=1e3)
    settings = TrainingSettings("ppo", types.AdamParams(learning_rate=0.1), groups_per_step=1, step_size=size)
    material = GroupMaterial([GROUPS[0], GROUPS[2]], settings)
    await material.prepare(backend)
    first, second = await run_steps(backend, material.steps(backend))
    assert second.values["kl_moved"] == second.values["kl_v2:mean"] > 0
    assert "kl_moved" not in first.values
    assert size.factor == second.values["lr_factor"] == 1.0


@pytest.mark.parametrize("steps", [1, 2])
async def test_the_move_on_records_is_from_the_policy_at_the_start(
    make_backend: Any, full_logprobs: Any, steps: int
) -> None:
    """Their own sampler is nats away, and stays there."""
    backend = await make_backend(perturbed=True)
    groups = [GROUPS[0], GROUPS[2]]

    def logprobs(group: TrajectoryGroup) -> torch.Tensor:
        of_calls = []
        for call in (call for calls in group.calls_G for call in calls):
            rows = full_logprobs(backend, [*call.prompt_ids, *call.output_ids][:-1])[-len(call.output_ids) :]
            of_calls.append(rows.gather(1, torch.tensor(call.output_ids)[:, None])[:, 0])
        return torch.cat(of_calls).detach()

    starts = {group.name: logprobs(group) for group in groups}
    size = StepSize(target=0.2)
    adam = types.AdamParams(learning_rate=1e-3)
    settings = TrainingSettings("ppo", adam, groups_per_step=3 - steps, sampled_elsewhere=True, step_size=size)
    material = GroupMaterial(groups, settings)
    await material.prepare(backend)
    seen: list[float] = []

    async def look(taken: Taken) -> None:
        """After each step: how far it and those before it have moved the next one's groups, or its own."""
        chosen = [group for index, group in enumerate(groups) if (index in taken.step.members) is (steps == 1)]
        gaps = [logprobs(group) - starts[group.name] for group in chosen]
        seen.append(float(torch.cat(gaps).square().mean() / 2))

    history = await run_steps(backend, material.steps(backend), on_step=look)
    assert len(history) == steps
    assert history[-1].values["kl_moved"] == pytest.approx(seen[0], rel=1e-3)
    assert 0 < seen[0] < 0.1 < 0.2 < history[0].values["kl_v2:mean"]
    assert size.factor == 1.0


class LaconicService:
    """A Tinker service whose forward_backward returns the loss, and for each Datum these outputs."""

    def __init__(self, backend: Any, *outputs: str) -> None:
        self._backend = backend
        self._outputs = outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def forward_backward_async(self, *args: Any, **options: Any) -> types.ForwardBackwardOutput:
        output = await self._backend.forward_backward_async(*args, **options)
        return types.ForwardBackwardOutput(
            loss_fn_output_type=output.loss_fn_output_type,
            loss_fn_outputs=[{name: each[name] for name in self._outputs} for each in output.loss_fn_outputs],
            metrics={"loss:sum": output.metrics["loss:sum"]},
        )


async def epoch_of(backend: Any, size: StepSize) -> list[StepMetrics]:
    settings = TrainingSettings("ppo", types.AdamParams(learning_rate=0.1), groups_per_step=1, step_size=size)
    material = GroupMaterial([GROUPS[0], GROUPS[2]], settings)
    await material.prepare(backend)
    return await run_steps(backend, material.steps(backend))


@pytest.mark.parametrize("target", [1e3, 1e-3])
async def test_a_service_that_names_no_kl_is_measured_by_its_logprobs(make_backend: Any, target: float) -> None:
    size, by_metric = StepSize(target), StepSize(target)
    steps = await epoch_of(LaconicService(await make_backend(perturbed=True), "logprobs"), size)
    expected = await epoch_of(await make_backend(perturbed=True), by_metric)
    assert len(steps) == len(expected) == (2 if target > 1 else 1)
    assert steps[-1].values["kl_moved"] == pytest.approx(expected[-1].values["kl_moved"], rel=1e-5)
    assert size.factor == pytest.approx(by_metric.factor)


async def test_a_service_without_logprobs_is_measured_after_the_last_step(
    make_backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    size = StepSize(target=1e-3)
    backend = LaconicService(await make_backend(perturbed=True))
    for _ in range(2):
        first, second = await epoch_of(backend, size)
        assert second.values["kl_moved"] > 1e-3
        assert "kl_moved" not in first.values
    assert size.factor < 1
    assert caplog.text.count("target_kl ends no epoch early") == 1


async def test_a_resumed_training_is_the_same_bit_for_bit(make_backend: Any) -> None:
    """With a schedule, a pull to the base and a target in force; the factor goes through JSON as in metrics.jsonl."""

    async def epoch(backend: Any, number: int, factor: float) -> float:
        size = StepSize(1e-3, factor, warmup=3, taken=number)
        settings = TrainingSettings(
            "ppo",
            types.AdamParams(learning_rate=0.05, grad_clip_norm=1.0),
            LearningRate(0.05, "cosine", number / 3, (number + 1) / 3),
            kl_beta=0.1,
            kl_estimator="k3",
            step_size=size,
        )
        material = GroupMaterial([GROUPS[0], GROUPS[2]], settings)
        await material.prepare(backend)
        await run_steps(backend, material.steps(backend))
        return size.factor

    whole = await make_backend(perturbed=True)
    factor = await epoch(whole, 0, 1.0)
    path = await whole.save_full_state("one")
    kept = json.dumps(factor)
    for number in (1, 2):
        factor = await epoch(whole, number, factor)

    resumed = await make_backend()
    await resumed.load_state(path, with_optimizer=True)
    later = json.loads(kept)
    for number in (1, 2):
        later = await epoch(resumed, number, later)
    assert later == factor < 1
    ends = [dict(backend._model.adapter.named_tensors()) for backend in (whole, resumed)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
