"""Old logprobs from the learner: the sampler's rounding reaches no weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from groups import ADAM, GROUPS, at_temperatures, steps_of
from torch import Tensor

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.loop import run_steps
from nat_plugin_evsys.training.policy_gradient import TrainingSettings, build_datums, policy_gradient_steps

TRAINED = [GROUPS[0], at_temperatures(GROUPS[2], [0.5, 1.0, 2.0])]


def rounded(group: TrajectoryGroup, digits: int) -> TrajectoryGroup:
    """The group as a sampler with coarser logprobs would have recorded it."""
    calls_G = [
        [dataclasses.replace(call, logprobs=[round(lp, digits) for lp in call.logprobs]) for call in calls]
        for calls in group.calls_G
    ]
    return TrajectoryGroup(group.name, group.rewards_G, calls_G)


async def trained(backend: Any, groups: list[TrajectoryGroup], *, recompute: bool) -> dict[str, Tensor]:
    await backend.snapshot_sampling_client()
    settings = TrainingSettings("ppo", ADAM, groups_per_step=1, passes=2, recompute_logprobs=recompute)
    await run_steps(backend, policy_gradient_steps(backend, build_datums(groups, settings), settings))
    return {name: tensor.detach().clone() for name, tensor in backend._model.adapter.named_tensors()}


async def test_what_a_sampler_rounded_changes_no_weight(make_backend: Any) -> None:
    coarse = [rounded(group, 2) for group in TRAINED]
    weights = [
        await trained(await make_backend(perturbed=True), groups, recompute=recompute)
        for recompute in (True, False)
        for groups in (TRAINED, coarse)
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not all(torch.equal(tensor, weights[3][name]) for name, tensor in weights[2].items())


async def test_the_ratio_is_1_before_the_first_step(make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)
    await backend.snapshot_sampling_client()
    (step,) = await steps_of(backend, TRAINED, recompute_logprobs=True)
    output = await backend.forward_backward_async(step.data, loss_fn="importance_sampling")
    assert output.metrics["ratio:max"] == pytest.approx(1, abs=1e-5)
    assert output.metrics["kl_v2:mean"] < 1e-10


async def test_unknown_logprobs_are_those_of_the_policy_at_the_start(make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)
    unknown = [
        dataclasses.replace(
            group,
            calls_G=[
                [dataclasses.replace(c, logprobs=[0.0] * len(c.logprobs), logprobs_unknown=True) for c in calls]
                for calls in group.calls_G
            ],
        )
        for group in TRAINED
    ]
    (step,) = await steps_of(backend, unknown)
    output = await backend.forward_backward_async(step.data, loss_fn="importance_sampling")
    assert output.metrics["ratio:max"] == pytest.approx(1, abs=1e-5)


async def test_calls_of_another_policy_are_refused(make_backend: Any) -> None:
    backend = await make_backend()
    await trained(backend, TRAINED, recompute=False)
    await backend.snapshot_sampling_client()
    with pytest.raises(DataError, match="which is version 4, but there are calls of version 0"):
        await steps_of(backend, TRAINED, recompute_logprobs=True)
