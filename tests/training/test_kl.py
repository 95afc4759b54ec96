"""The pull to the base model, each estimator against an independent autograd computation; and where steps end."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from groups import GROUPS, at_temperatures, steps_of
from tinker import types

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.training.group_material import GroupMaterial
from nat_plugin_evsys.training.kl import kl_coefficient
from nat_plugin_evsys.training.loop import run_steps
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.step_size import StepSize

BETA = 0.3


def base_logprobs(backend: Any, ids: list[int]) -> torch.Tensor:
    """(N, V) of the base model, without the adapter."""
    with applied(None), torch.no_grad():
        return backend.base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
async def test_the_gradient_is_autograds(
    estimator: str, temperature: float, make_backend: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    groups = [at_temperatures(group, [temperature]) for group in GROUPS]
    backend = await make_backend(perturbed=True)
    (step,) = await steps_of(backend, groups, normalization="tokens", kl_beta=BETA, kl_estimator=estimator)
    await backend.forward_backward_async(step.data, loss_fn="importance_sampling")

    loss = torch.zeros((), dtype=torch.float64)
    to_base, tokens = [], 0
    for group in groups:
        mean = sum(group.rewards_G) / len(group.rewards_G)
        for reward, calls in zip(group.rewards_G, group.calls_G, strict=True):
            for call in calls:
                ids, n = [*call.prompt_ids, *call.output_ids][:-1], len(call.output_ids)
                target = torch.tensor(call.output_ids)[:, None]
                lp, ref = (
                    (whole[-n:] / temperature).log_softmax(-1).gather(1, target)[:, 0]
                    for whole in (full_logprobs(backend, ids), base_logprobs(backend, ids))
                )
                q = torch.tensor(call.logprobs, dtype=torch.float32).double()
                ratio = (lp - q).exp()
                penalty = {
                    "k1": ratio * (q - ref),
                    "k2": ratio.detach() * (lp - ref).square() / 2,
                    "k3": ratio.detach() * ((ref - lp).exp() - (ref - lp) - 1),
                }[estimator]
                loss = loss - (ratio * (reward - mean) - BETA * penalty).sum()
                to_base.append((ref - q).exp() - (ref - q) - 1)
                tokens += n
    assert gradient_error(backend, loss / tokens) < 1e-5
    assert step.measured["kl_base:mean"] == pytest.approx(float(torch.cat(to_base).mean()), rel=1e-4)


async def test_the_base_is_the_model_without_the_adapter(make_backend: Any) -> None:
    fresh, moved = await make_backend(), await make_backend(perturbed=True)
    (step,) = await steps_of(fresh, GROUPS)
    own = await fresh.forward_async(
        [types.Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in step.data],
        loss_fn="cross_entropy",
    )
    for base, learner in zip(await moved.base_logprobs_async(step.data), own.loss_fn_outputs, strict=True):
        assert base.tolist() == pytest.approx(learner["logprobs"].tolist(), abs=1e-5)


async def test_on_records_the_pull_is_of_the_learner(make_backend: Any) -> None:
    """Their sampler may be anywhere; a policy that is the base model is not pulled by them."""
    fresh, moved = await make_backend(), await make_backend(perturbed=True)
    records = {"kl_beta": 0.1, "sampled_elsewhere": True}
    (at_base,) = await steps_of(fresh, GROUPS, kl_estimator="k1", **records)
    (unpulled,) = await steps_of(fresh, GROUPS, kl_beta=1e-9)
    assert at_base.measured["kl_base:mean"] == pytest.approx(0.0, abs=1e-9)
    assert advantages(at_base) == pytest.approx(advantages(unpulled), abs=1e-6)

    (k1,) = await steps_of(moved, GROUPS, kl_estimator="k1", **records)
    (k2,) = await steps_of(moved, GROUPS, kl_estimator="k2", **records)
    assert k1.measured["kl_base:mean"] > 1e-6
    assert advantages(k1) == advantages(k2) != pytest.approx(advantages(unpulled), abs=1e-6)


def advantages(step: Any) -> list[float]:
    """Those of all tokens of a step."""
    return [value for datum in step.data for value in datum.loss_fn_inputs["advantages"].tolist()]


async def test_a_strong_pull_brings_the_policy_back(make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)

    async def distance(step: Any) -> float:
        """Mean gap of the learner to the base over the tokens of the step that are trained."""
        bare = [types.Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in step.data]
        learner = (await backend.forward_async(bare, loss_fn="cross_entropy")).loss_fn_outputs
        gaps = [
            abs(lp - ref)
            for datum, own, base in zip(step.data, learner, await backend.base_logprobs_async(step.data), strict=True)
            for lp, ref, advantage in zip(
                own["logprobs"].tolist(), base.tolist(), datum.loss_fn_inputs["advantages"].tolist(), strict=True
            )
            if advantage
        ]
        return sum(gaps) / len(gaps)

    distances = []
    for _ in range(12):
        (step,) = await steps_of(backend, GROUPS, kl_beta=20.0, kl_estimator="k2")
        distances.append(await distance(step))
        await backend.forward_backward_async(step.data, loss_fn="importance_sampling")
        await backend.optim_step_async(types.AdamParams(learning_rate=1e-2))
    assert distances[-1] < distances[0] / 2


def test_coefficients_are_the_derivatives() -> None:
    q, lp, ref = (torch.tensor(values, dtype=torch.float64) for values in ([-1.0, -2.0], [-1.5, -1.0], [-3.0, -0.5]))
    arrays = q.numpy(), lp.numpy(), ref.numpy()
    lp.requires_grad_()
    for estimator, kl in (("k2", (lp - ref).square() / 2), ("k3", (ref - lp).exp() - (ref - lp) - 1)):
        (expected,) = torch.autograd.grad(kl.sum(), lp)
        assert kl_coefficient(*arrays, estimator) == pytest.approx(expected.numpy())
    assert kl_coefficient(arrays[0], None, arrays[2], "k1") == pytest.approx([2.0, -1.5])
    with pytest.raises(ConfigError, match="unknown KL estimator `k4`"):
        kl_coefficient(*arrays, "k4")
    with pytest.raises(ConfigError, match="needs the learner's logprobs"):
        kl_coefficient(arrays[0], None, arrays[2], "k3")


async def test_target_kl_ends_the_steps_and_counts_what_was_not_trained(make_backend: Any) -> None:
    async def train(target: float | None) -> tuple[list[Any], Any, Any]:
        backend = await make_backend(perturbed=True)
        settings = TrainingSettings(
            "ppo", types.AdamParams(learning_rate=0.3), groups_per_step=1, passes=2, step_size=StepSize(target)
        )
        material = GroupMaterial([GROUPS[0], GROUPS[2]], settings)
        await material.prepare(backend)
        taken = []

        async def on_step(step: Any) -> None:
            taken.append(step)
            material.trained(step)

        await run_steps(backend, material.steps(backend), on_step=on_step)
        return taken, material.account(DropReason.NOT_REACHED), backend

    taken, account, backend = await train(None)
    assert (len(taken), backend.step, dict(account.calls.dropped)) == (4, 4, {})
    moved = [step.metrics.values["kl_v2:mean"] for step in taken]
    assert max(moved[1:]) > 0.05
    assert math.isfinite(sum(moved))

    taken, account, backend = await train(max(moved[1:]) + 1)
    assert (len(taken), backend.step) == (4, 4)

    taken, account, backend = await train(1e-6)
    assert (len(taken), backend.step) == (1, 1)
    (first,) = taken[0].step.members
    left = [GROUPS[0], GROUPS[2]][1 - first]
    assert account.calls.dropped == {DropReason.MOVED_TOO_FAR: left.num_calls}
    assert account.calls.trained + left.num_calls == account.calls.calls
    assert backend._model.gradient is None or all(not g.any() for g in backend._model.gradient.values())


@pytest.mark.parametrize("wrong", [{"kl_beta": -1.0}, {"step_size": StepSize(0.0)}, {"step_size": StepSize(warmup=-1)}])
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kl_beta and the warm-up must be 0 or more"):
        TrainingSettings("ppo", types.AdamParams(), **wrong)
