"""The learner has the temperature that each call was sampled at; a distribution that was cut is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from groups import GROUPS, at_temperatures, steps_of
from tinker import types

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import train_rl

ADAM = types.AdamParams(learning_rate=1e-3)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
async def test_the_ratio_is_1_at_the_first_step(temperature: float, make_backend: Any, render: Any) -> None:
    backend = await make_backend(perturbed=True)
    (record,) = await train_rl(
        backend,
        ["alpha", "beta"],
        render=lambda row: render([{"role": "user", "content": row}]),
        reward=lambda row, text: sum(" " <= c <= "~" for c in text),
        settings=TrainingSettings("importance_sampling", ADAM),
        epochs=1,
        batch_size=2,
        group_size=16,
        sampling=types.SamplingParams(max_tokens=12, temperature=temperature, stop=[]),
    )
    assert record.steps[0]["tokens:sum"] > 50
    assert record.steps[0]["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert record.steps[0]["ratio:max"] == pytest.approx(1.0, abs=1e-3)
    assert record.steps[0]["kl_v2:mean"] < 1e-7


async def test_the_gradient_is_that_of_the_tempered_softmax(
    make_backend: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    """Two temperatures, also at one shared prompt position, against autograd over the whole vocabulary."""
    one, other = GROUPS[0], GROUPS[2]
    same_prompt = [[dataclasses.replace(call, prompt_ids=[1, 2, 3]) for call in calls] for calls in other.calls_G]
    groups = [
        at_temperatures(one, [0.5, 1.0, 2.0]),
        at_temperatures(TrajectoryGroup("same", other.rewards_G, same_prompt), [0.7, 1.4]),
    ]
    backend = await make_backend(perturbed=True)
    (step,) = await steps_of(backend, groups, normalization="sum")
    output = await backend.forward_backward_async(step.data, loss_fn="importance_sampling")

    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        mean = sum(group.rewards_G) / len(group.rewards_G)
        for reward, calls in zip(group.rewards_G, group.calls_G, strict=True):
            for call in calls:
                whole = full_logprobs(backend, [*call.prompt_ids, *call.output_ids][:-1])[-len(call.output_ids) :]
                rows = (whole / call.temperature).log_softmax(dim=-1)
                lp = rows.gather(1, torch.tensor(call.output_ids)[:, None])[:, 0]
                gap = lp - torch.tensor(call.logprobs, dtype=torch.float32).double()
                loss = loss - (gap.exp() * (reward - mean)).sum()
    assert gradient_error(backend, loss) < 1e-5
    assert output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)


async def test_a_datum_of_temperature_1_is_tinkers_own(make_backend: Any) -> None:
    (step,) = await steps_of(await make_backend(), GROUPS)
    assert all("temperature" not in datum.loss_fn_inputs for datum in step.data)


async def test_the_engine_refuses_what_is_no_temperature(make_backend: Any) -> None:
    backend = await make_backend()
    (step,) = await steps_of(backend, [at_temperatures(group, [0.5]) for group in GROUPS])
    datum = step.data[0]
    rows = len(datum.loss_fn_inputs["advantages"].tolist())
    zero = types.TensorData(data=[0.0] * rows, dtype="float32", shape=[rows])
    wrong = types.Datum(datum.model_input, {**datum.loss_fn_inputs, "temperature": zero})
    with pytest.raises(DataError, match=r"temperature\[0\] is 0.0"):
        await backend.forward_backward_async([wrong], loss_fn="importance_sampling")


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 5}])
async def test_a_cut_distribution_is_refused(cut: dict[str, Any], make_backend: Any, render: Any) -> None:
    backend = await make_backend()
    with pytest.raises(ConfigError, match="top_p, top_k or repetition_penalty"):
        await train_rl(
            backend,
            ["alpha"],
            render=lambda row: render([{"role": "user", "content": row}]),
            reward=lambda row, text: 0.0,
            settings=TrainingSettings("importance_sampling", ADAM),
            epochs=1,
            batch_size=1,
            group_size=2,
            sampling=types.SamplingParams(max_tokens=2, **cut),
        )
    assert backend.step == 0


async def test_a_custom_loss_sees_the_tempered_logprobs(make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)
    (step,) = await steps_of(backend, [at_temperatures(group, [0.5]) for group in GROUPS])
    named = await backend.forward_async(step.data, loss_fn="importance_sampling")
    seen: list[torch.Tensor] = []

    def loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        seen.extend(row.detach().clone() for row in logprobs)
        return torch.stack([row.sum() for row in logprobs]).sum(), {}

    await backend.forward_backward_custom_async(step.data, loss)
    for row, expected, datum in zip(seen, named.loss_fn_outputs, step.data, strict=True):
        trained = datum.loss_fn_inputs["advantages"].to_torch() != 0
        torch.testing.assert_close(row[trained], expected["logprobs"].to_torch()[trained], rtol=0, atol=1e-5)
