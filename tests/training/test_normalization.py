"""What a token weighs: each normalisation against an independent autograd computation, and what does not change it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from groups import ADAM, GROUPS, make_group, steps_of

from nat_plugin_evsys.backends.base import Architecture
from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.learning_rate import LearningRate, default_rate
from nat_plugin_evsys.training.loop import NamedLoss, Step
from nat_plugin_evsys.training.normalization import datum_scales
from nat_plugin_evsys.training.policy_gradient import TrainingSettings


def weight_by_hand(how: str, groups: list[TrajectoryGroup], trajectory: list[Call], full_step: int) -> float:
    """The weight of each token of ``trajectory`` in a step of ``groups``, by the formulas."""
    everything = [calls for group in groups for calls in group.calls_G]
    tokens = [sum(len(call.output_ids) for call in calls) for calls in everything]
    return {
        "sum": 1.0,
        "tokens": 1 / sum(tokens),
        "sequences": 1 / (len(everything) * sum(len(call.output_ids) for call in trajectory)),
        "full_step": 1 / (full_step * sum(tokens) / len(groups)),
    }[how]


@pytest.mark.parametrize("how", ["full_step", "tokens", "sequences", "sum"])
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "cispo", "dro"])
async def test_the_gradient_is_autograds(
    how: str, loss_fn: str, make_backend: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    if (how, loss_fn) == ("sequences", "dro"):
        return
    backend, beta = await make_backend(perturbed=True), 0.3
    config = {"beta": beta} if loss_fn == "dro" else None
    (step,) = await steps_of(
        backend, GROUPS, normalization=how, groups_per_step=4, loss_fn=loss_fn, loss_fn_config=config
    )
    assert isinstance(step.loss, NamedLoss)
    await backend.forward_backward_async(step.data, loss_fn=step.loss.name, loss_fn_config=step.loss.config)

    trained = [GROUPS[0], GROUPS[2]]
    loss = torch.zeros((), dtype=torch.float64)
    for group in trained:
        mean = sum(group.rewards_G) / len(group.rewards_G)
        for reward, calls in zip(group.rewards_G, group.calls_G, strict=True):
            weight = weight_by_hand(how, trained, calls, full_step=4)
            for call in calls:
                rows = full_logprobs(backend, [*call.prompt_ids, *call.output_ids][:-1])[-len(call.output_ids) :]
                lp = rows.gather(1, torch.tensor(call.output_ids)[:, None])[:, 0]
                gap = lp - torch.tensor(call.logprobs, dtype=torch.float32).double()
                advantage = reward - mean
                objective = {
                    "importance_sampling": gap.exp() * advantage,
                    "cispo": gap.exp().clamp(0, 4).detach() * lp * advantage,
                    "dro": lp * advantage - beta / 2 * gap.square(),
                }[loss_fn]
                loss = loss - weight * objective.sum()
    assert gradient_error(backend, loss) < 1e-5


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo"])
async def test_each_loss_is_tinkers_sum_over_scaled_advantages(loss_fn: str, make_backend: Any) -> None:
    """The mean over the step's tokens, the clipped losses' minimum included."""
    gradients, tokens = [], 0
    for how in ("sum", "tokens"):
        backend = await make_backend(perturbed=True)
        (step,) = await steps_of(backend, GROUPS, normalization=how, loss_fn=loss_fn)
        await backend.forward_backward_async(step.data, loss_fn=step.loss.name)
        gradients.append(torch.cat([tensor.flatten().clone() for tensor in backend._model.gradient.values()]))
        tokens = step.sampled_tokens
    plain, mean = gradients
    assert plain.norm() > 0
    assert (mean * tokens - plain).norm() < 1e-5 * plain.norm()


async def test_a_token_weighs_the_same_whatever_else_is_in_its_step(make_backend: Any) -> None:
    """With ``full_step``; neither dropped groups nor a step that is not full nor a long neighbour changes it."""
    backend = await make_backend()
    alone = make_group("alone", [1.0, 0.0], 5)
    dull = make_group("dull", [1.0, 1.0], 6)

    def advantages(step: Step, group: str = "alone") -> list[float]:
        return [max(map(abs, datum.loss_fn_inputs["advantages"].tolist())) for datum in step.data][:2]

    (with_dull,) = await steps_of(backend, [alone, dull], groups_per_step=2)
    (without,) = await steps_of(backend, [alone], groups_per_step=2)
    assert advantages(with_dull) == advantages(without)
    assert with_dull.adam == without.adam == ADAM
    tokens = sum(len(calls[0].output_ids) for calls in alone.calls_G)
    assert advantages(without) == pytest.approx([0.5 / (2 * tokens)] * 2)

    (own,) = await steps_of(backend, [alone], groups_per_step=2, normalization="tokens")
    assert advantages(own) == pytest.approx([0.5 / tokens] * 2)
    (plain,) = await steps_of(backend, [alone], groups_per_step=2, normalization="sum")
    assert advantages(plain) == [0.5, 0.5]


async def test_the_scale_of_a_step_does_not_depend_on_its_size(make_backend: Any) -> None:
    """Gradients of small steps add up to that of the large one, times how many small ones make a large one."""
    groups = [make_group(str(i), [1.0, 0.0, 0.5], 10 + i) for i in range(4)]
    gradients = []
    for size in (4, 1):
        backend = await make_backend(perturbed=True)
        for step in await steps_of(backend, groups, groups_per_step=size):
            assert isinstance(step.loss, NamedLoss)
            await backend.forward_backward_async(step.data, loss_fn=step.loss.name)
        gradients.append({name: tensor.clone() for name, tensor in backend._model.gradient.items()})
    large, small = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in gradients)
    assert (small - 4 * large).norm() < 1e-5 * small.norm()


def test_scales_and_rates() -> None:
    assert datum_scales([2, 3, 5], [0, 0, 1], "sequences") == [1 / 10, 1 / 10, 1 / 10]
    assert datum_scales([2, 3, 5], [0, 0, 1], "full_step", full_step_tokens=20) == [1 / 20] * 3
    assert datum_scales([2, 3, 5], [0, 0, 1], "full_step") == datum_scales([2, 3, 5], [0, 0, 1], "tokens")
    with pytest.raises(ConfigError, match="unknown normalization `mean`"):
        datum_scales([1], [0], "mean")  # type: ignore[arg-type]


def test_dro_refuses_scales_that_differ_between_datums() -> None:
    with pytest.raises(ConfigError, match="dro"):
        TrainingSettings(loss_fn="dro", adam=ADAM, normalization="sequences")


def test_schedules() -> None:
    def rates(steps: int, **options: Any) -> list[float]:
        rate = LearningRate(1.0, **options)
        return [rate.at_step(step, steps) for step in range(1, steps + 1)]

    assert rates(4) == [1.0] * 4
    assert rates(4, decay="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(4, decay="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(8, decay="wsd") == pytest.approx([1.0] * 5 + [0.75, 0.5, 0.25])
    run = LearningRate(1.0, "cosine")
    parts = [dataclasses.replace(run, start=i / 4, end=(i + 1) / 4) for i in range(4)]
    whole = [run.at_step(step, 20) for step in range(1, 21)]
    assert [part.at_step(step, 5) for part in parts for step in range(1, 6)] == pytest.approx(whole)
    for wrong in ({"peak": 0.0}, {"peak": 1.0, "decay": "step"}):
        with pytest.raises(ConfigError):
            LearningRate(**wrong)


@pytest.mark.parametrize(
    ("architecture", "rate"),
    [
        (Architecture("llama", 2000), 5e-4),
        (Architecture("llama", 4096), 0.00029),
        (Architecture("qwen3_moe", 4096), 0.00047),
        (Architecture("llama", 576), 5e-4),  # SmolLM2-135M; more in the cookbook
        (Architecture("qwen3", 1024), 5e-4),
        (None, 5e-4),
    ],
)
def test_the_rate_of_a_wide_model_is_tinker_cookbooks(architecture: Architecture | None, rate: float) -> None:
    assert default_rate(architecture) == rate
