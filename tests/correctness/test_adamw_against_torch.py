"""``optim_step`` against torch.optim.AdamW in float64 and against AdamW's formula, on gradients of the engine."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types
from tiny import VOCAB, perturb

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter

TOLERANCE = 1e-5

adam_params = st.builds(
    types.AdamParams,
    learning_rate=st.sampled_from([0.0, 1e-4, 1e-2]),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0.5, 0.999),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    grad_clip_norm=st.sampled_from([0.0, 0.05, 1.0, 1e6]),
)


def batch(seed: int) -> list[types.Datum]:
    rng = random.Random(seed)
    rows = [[rng.randrange(VOCAB) for _ in range(rng.randrange(3, 20))] for _ in range(3)]
    return [types.Datum(types.ModelInput.from_ints(r[:-1]), {"target_tokens": r[1:]}) for r in rows]


class Formula:
    """Algorithm 2 of arXiv 1711.05101 with Adam's bias correction, written out in float64."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.w = {n: w.detach().double().clone() for n, w in weights.items()}
        self.m = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.v = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.t = 0

    def step(self, gradient: dict[str, torch.Tensor], p: types.AdamParams) -> None:
        self.t += 1
        total = math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
        clip = min(1.0, p.grad_clip_norm / (total + 1e-6)) if p.grad_clip_norm > 0 else 1.0
        for n, g in gradient.items():
            self.w[n] *= 1 - p.learning_rate * p.weight_decay
            self.m[n] = p.beta1 * self.m[n] + (1 - p.beta1) * clip * g
            self.v[n] = p.beta2 * self.v[n] + (1 - p.beta2) * (clip * g) ** 2
            m_hat, v_hat = self.m[n] / (1 - p.beta1**self.t), self.v[n] / (1 - p.beta2**self.t)
            self.w[n] -= p.learning_rate * m_hat / (v_hat.sqrt() + p.eps)


def test_every_step_is_adamws(base_of: Any, measured: Any) -> None:
    base = base_of("llama")
    worst = {"torch.optim.AdamW": 0.0, "its formula": 0.0}
    runs = steps = clipped = 0

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(adam_params, min_size=1, max_size=6), st.integers(0, 999))
    def check(schedule: list[types.AdamParams], seed: int) -> None:
        nonlocal runs, steps, clipped
        model = TrainableModel(base, perturb(LoraAdapter.create(base.model, rank=3, alpha=5.0, seed=seed), seed))
        theirs = {n: p.detach().double().clone().requires_grad_() for n, p in model.parameters.items()}
        reference, formula = torch.optim.AdamW(theirs.values()), Formula(model.parameters)
        for number, adam in enumerate(schedule):
            for part in range(2):  # the gradient of two calls together
                model.forward_backward(batch(seed + 7 * number + part), "cross_entropy")
            assert model.gradient is not None
            gradient = {n: g.double().clone() for n, g in model.gradient.items()}
            metrics = model.optim_step(adam).metrics
            assert metrics is not None
            for n, p in theirs.items():
                p.grad = gradient[n].clone()
            if adam.grad_clip_norm > 0:
                torch.nn.utils.clip_grad_norm_(theirs.values(), adam.grad_clip_norm)
                clipped += metrics["clip_coefficient"] < 1
            reference.param_groups[0].update(
                lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
            )
            reference.step()
            formula.step(gradient, adam)
            for key, wanted in (("torch.optim.AdamW", theirs), ("its formula", formula.w)):
                for n, p in model.parameters.items():
                    gap = float((p.detach() - wanted[n].detach()).abs().max())
                    worst[key] = max(worst[key], gap / float(wanted[n].detach().abs().max()))
            steps += 1
        runs += 1

    check()
    assert clipped > 5
    for key, value in worst.items():
        measured(
            "9 optimizer and PEFT", f"weights after each AdamW step vs {key} in float64 (relative)",
            worst=value, bound=TOLERANCE, schedules=runs, steps=steps, clipped=clipped,
        )  # fmt: skip
