"""A linear layer with its LoRA pair as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + bias + scale * (x A^T) B^T``, exactly, with gradients by x, A and B only.

    Args:
        x: [..., in]. weight: [out, in] and bias: [out], frozen.
        a: [rank, in]. b: [out, rank]. Both in x's dtype.

    Returns:
        [..., out]. B's share is added into the product with W, in the forward pass and in the gradient by x, so no
        tensor of the size of x or of the output is made besides the result; x is kept once for A's gradient.
    """
    out: Tensor = _LoraLinear.apply(x, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]  # torch gives apply() no types
    return out


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ a.T
        out = F.linear(flat, weight, bias).addmm_(low, b.T, alpha=scale)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        # Not as a view, which a model may not write to (Llama 4 adds its experts in place).
        shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
        return shaped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        flat, low, weight, a, b = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        grad_low = (flat_grad @ b).mul_(ctx.scale)
        grad_a = grad_low.T @ flat if ctx.needs_input_grad[3] else None
        # As rank x out: the product the other way round is slower, and this one is small enough to be transposed.
        grad_b = (low.T @ flat_grad).mul_(ctx.scale).T if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (flat_grad @ weight).addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
