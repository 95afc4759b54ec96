"""A step's gradient: the fast path against padded batches, fp32 against the CPU's, bf16 against fp32."""

from __future__ import annotations

import torch
from findings import Findings
from models import build_model, tensors_of
from place import Place
from torch import Tensor
from worker import ours
from workloads import workload

FP32_BOUND = 1e-5
BF16_BOUND = 0.1
"""Of the whole gradient's norm: bf16 keeps 8 bits, and both ways round in every layer."""

Gradient = dict[str, Tensor]


def check(findings: Findings, place: Place, family: str) -> None:
    """The workloads W1, W2, W2v and W3; the reference is the plain path in fp32 on the CPU."""
    shape = place.exact_shape(family)
    # Rounded to bf16, so that the weights are the same in both precisions.
    weights = tensors_of(build_model(shape, dtype=torch.bfloat16))
    reference = ours(shape, path="plain", weights=weights)
    plain, fast = (ours(shape, path=path, device=place.device, weights=weights) for path in ("plain", "auto"))
    fast_bf16 = ours(shape, device=place.device, dtype=torch.bfloat16, weights=weights)
    for name in ("W1", "W2", "W2v", "W3"):
        data = workload(name, shape)
        expected, by_fast = reference(data)[0], fast(data)[0]
        findings.exact(f"{family} {name} fast vs plain", largest_gap(by_fast, plain(data)[0]), FP32_BOUND)
        findings.exact(f"{family} {name} fp32 vs CPU", largest_gap(by_fast, expected), FP32_BOUND)
        findings.exact(f"{family} {name} bf16 vs fp32", norm_gap(fast_bf16(data)[0], expected), BF16_BOUND)


def largest_gap(found: Gradient, expected: Gradient) -> float:
    """Largest difference of any tensor, relative to that tensor's largest value."""
    gaps = [(found[n].cpu() - g.cpu()).abs().max() / g.cpu().abs().max() for n, g in expected.items()]
    return float(torch.stack(gaps).max())  # NaN if one of them is


def norm_gap(found: Gradient, expected: Gradient) -> float:
    """Norm of the difference of two whole gradients, relative to that of ``expected``."""
    difference = sum(float((found[n].cpu().double() - g.cpu().double()).square().sum()) for n, g in expected.items())
    return float((difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)
