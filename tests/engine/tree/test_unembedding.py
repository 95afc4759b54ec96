"""Logprobs, entropies and gradients of targets against autograd in float64 over the same hidden states and weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.forward import OutputHead, target_logprobs
from nat_plugin_evsys.engine.tree.unembedding import Pairs, pair_logprobs

WEIGHTS = torch.tensor([1.0, -0.5, 2.0, 0.25, 1.5, -1.0, 0.75, 1.0])
"""Of the logprobs in the loss; rows 1 and 3 have two targets."""
ROWS, TARGETS = torch.tensor([0, 1, 1, 2, 3, 3, 4, 5]), torch.tensor([7, 3, 90, 0, 11, 12, 50, 199])


def exact(head: OutputHead, hidden: Tensor, temperature: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(logprobs (P,), entropy (R,), gradient [R, H])``."""
    h = hidden.detach().double().requires_grad_()
    logits = h @ head.linear.weight.double().T * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    rows = (logits if temperature is None else logits / temperature.double()[:, None]).log_softmax(dim=-1)
    logprobs = rows[ROWS, TARGETS]
    (gradient,) = torch.autograd.grad((logprobs * WEIGHTS).sum(), h)
    return logprobs.detach(), -(rows.exp() * rows).sum(dim=-1).detach(), gradient


def found(head: OutputHead, hidden: Tensor, temperature: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    h = hidden.detach().clone().requires_grad_()
    pairs = Pairs(ROWS, TARGETS)
    logprobs, entropy = pair_logprobs(head, None, h, pairs, torch.ones(len(ROWS), dtype=torch.bool), temperature)
    (gradient,) = torch.autograd.grad((logprobs * WEIGHTS).sum(), h)
    return logprobs.detach(), entropy, gradient


def hidden_states(head: OutputHead, size: float) -> Tensor:
    shape = 6, head.linear.weight.shape[1]
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size).to(head.linear.weight.dtype)


def confident_states(head: OutputHead, logit: float) -> Tensor:
    """Hidden states whose first target has about this logit, and other tokens less."""
    first = head.linear.weight[TARGETS[torch.tensor([0, 1, 3, 4, 6, 7])]].float()
    return (first * (logit / first.square().sum(dim=1, keepdim=True))).to(head.linear.weight.dtype)


def off(tensor: Tensor, expected: Tensor) -> float:
    return float((tensor.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["qwen3", "granite", "gemma3_soft_cap"])
@pytest.mark.parametrize("temperature", [None, torch.tensor([0.3, 0.7, 1.0, 1.3, 0.7, 2.0])])
def test_float32(family: str, temperature: Tensor | None, base_of: Any) -> None:
    head = OutputHead(base_of(family).model)
    hidden = hidden_states(head, 2.0)
    for tensor, expected in zip(found(head, hidden, temperature), exact(head, hidden, temperature), strict=True):
        assert off(tensor, expected) < 3e-6


@pytest.mark.parametrize("logit", [8.0, 12.0, 16.0])
def test_the_gradient_of_confident_tokens_survives_bfloat16(logit: float, base_of: Any) -> None:
    """It is ``(1 - p) W[t]``, far below the rounding of ``p W``."""
    head = OutputHead(base_of("qwen3", None, torch.bfloat16).model)
    hidden = confident_states(head, logit)
    _, _, gradient = found(head, hidden)
    _, _, expected = exact(head, hidden)
    confident = torch.tensor([0, 2, 4, 5])  # rows of a single target
    assert off(gradient[confident], expected[confident]) < 0.04
    assert off(gradient, expected) < 0.02


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.3])
def test_bfloat16_does_not_round_the_temperature(temperature: float, base_of: Any) -> None:
    """The sampler divides the logits in fp32."""
    head = OutputHead(base_of("qwen3", None, torch.bfloat16).model)
    hidden = hidden_states(head, 2.0)
    of_rows = torch.full((len(hidden),), temperature)
    expected = (head(hidden) / temperature).log_softmax(dim=-1)[ROWS, TARGETS]
    torch.testing.assert_close(found(head, hidden, of_rows)[0], expected, rtol=0, atol=1e-5)
    all_rows = torch.ones(len(hidden), dtype=torch.bool)
    plain, _ = target_logprobs(head, None, hidden, TARGETS.expand(len(hidden), -1), all_rows, of_rows)
    torch.testing.assert_close(plain[ROWS, torch.arange(len(ROWS))], expected, rtol=0, atol=1e-5)
