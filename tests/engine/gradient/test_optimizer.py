"""AdamW against torch.optim.AdamW, clipping, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tinker import types

from nat_plugin_evsys.engine.gradient.optimizer import AdamW
from nat_plugin_evsys.errors import ConfigError, DataError, NonFiniteGradientError


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in SHAPES.items()}


SHAPES = {"a": (3, 5), "b": (7, 3)}
SCHEDULE = [
    types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-12),
    types.AdamParams(learning_rate=5e-3, beta1=0.8, beta2=0.999, eps=1e-8, weight_decay=0.1),
    types.AdamParams(learning_rate=2e-3, weight_decay=0.01, grad_clip_norm=0.5),
    types.AdamParams(learning_rate=1e-3, grad_clip_norm=1e6),
]


def test_every_step_equals_torch_adamw() -> None:
    mine, theirs = parameters(), parameters()
    ours = AdamW(mine)
    reference = torch.optim.AdamW(theirs.values())
    generator = torch.Generator().manual_seed(4)
    for adam in SCHEDULE:
        gradient = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        metrics = ours.step(gradient, adam)
        for name, p in theirs.items():
            p.grad = gradient[name].clone()
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.values() if p.grad is not None])
        if adam.grad_clip_norm > 0:
            torch.nn.utils.clip_grad_norm_(theirs.values(), adam.grad_clip_norm)
        reference.param_groups[0].update(
            lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        reference.step()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-8)


def test_decoupled_decay_by_hand() -> None:
    weights = {"w": torch.tensor([2.0]).requires_grad_()}
    AdamW(weights).step({"w": torch.tensor([3.0])}, types.AdamParams(learning_rate=0.1, weight_decay=0.5, eps=1e-12))
    # First step: m_hat / sqrt(v_hat) is the gradient's sign; the decay acts on the weight alone.
    assert weights["w"].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_is_refused(bad: float, trainable: Any, make_ce_datums: Any) -> None:
    model = trainable(perturbed=True)
    data = make_ce_datums(1)
    adam = types.AdamParams(learning_rate=1e-2)
    model.forward_backward(data, "cross_entropy")
    model.optim_step(adam)
    weights = {n: p.detach().clone() for n, p in model.parameters.items()}
    moments = {n: t.clone() for n, t in model.optimizer.state_tensors().items()}
    model.forward_backward(data, "cross_entropy")
    next(iter(model.gradient.values()))[0, 0] = bad
    with pytest.raises(NonFiniteGradientError, match=r"not finite in 1 of \d+ matrices.*lora_A"):
        model.optim_step(adam)
    assert model.step == 1
    assert model.gradient is None
    assert all(torch.equal(model.parameters[n], w) for n, w in weights.items())
    assert all(torch.equal(model.optimizer.state_tensors()[n], m) for n, m in moments.items())
    model.forward_backward(data, "cross_entropy")
    assert model.optim_step(adam).metrics["step"] == 2


def test_overflowing_ratios_reach_the_step_as_a_refusal(trainable: Any, make_rl_datums: Any) -> None:
    data = make_rl_datums(1, logprobs=lambda n, rng: [-200.0] * n)
    model = trainable()
    model.forward_backward(data, "importance_sampling")
    with pytest.raises(NonFiniteGradientError):
        model.optim_step(types.AdamParams())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"beta2": -0.1}, "beta2 is -0.1"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": math.inf}, "weight_decay is inf"),
        ({"grad_clip_norm": -1.0}, "grad_clip_norm is -1"),
    ],
)
def test_bad_adam_params_keep_the_gradient(
    values: dict[str, float], message: str, trainable: Any, make_ce_datums: Any
) -> None:
    model = trainable()
    model.forward_backward(make_ce_datums(1), "cross_entropy")
    with pytest.raises(ConfigError, match=message):
        model.optim_step(types.AdamParams(**values))
    assert model.gradient is not None
    assert model.step == 0


def test_other_optimizers_are_refused(trainable: Any) -> None:
    with pytest.raises(ConfigError, match="DimuonParams"):
        trainable().optim_step(types.DimuonParams(learning_rate=0.1))


def test_a_step_without_gradient_is_refused(trainable: Any, make_ce_datums: Any) -> None:
    model = trainable()
    with pytest.raises(DataError, match="call forward_backward first"):
        model.optim_step(types.AdamParams())
    model.forward_backward(make_ce_datums(1), "cross_entropy")
    model.optim_step(types.AdamParams())
    with pytest.raises(DataError, match="call forward_backward first"):
        model.optim_step(types.AdamParams())
