"""Norms and rotary embedding in few passes, with their gradients, for ``fused_layer``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(x / rms(x), 1 / rms(x))`` over the last dimension."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * rstd, rstd


def plus_norm_gradient(to: Tensor, grad: Tensor, normed: Tensor, rstd: Tensor) -> Tensor:
    """``to`` plus the gradient by x of ``normed = x * rstd``: ``rstd * (grad - normed * mean(grad * normed))``."""
    mean = (grad * normed).mean(-1, keepdim=True).neg_()
    return torch.addcmul(to, torch.addcmul(grad, normed, mean), rstd)


@dataclass(frozen=True)
class Rotary:
    """A norm over each head, where there is one, then the rotary embedding.

    Attributes:
        cos, sin: [T, 1, dim]; the first half of ``sin`` is negative. The norm's weight is in them.
        eps: of the norm; None where there is no norm.
    """

    cos: Tensor
    sin: Tensor
    eps: float | None

    @classmethod
    def build(cls, cos: Tensor, sin: Tensor, gain: Tensor | None, eps: float) -> Rotary:
        """From tables without a weight, and the weight ``gain [dim]``: ``sin`` meets the other half of the head."""
        if gain is None:
            return cls(cos, sin, None)
        return cls(cos * gain, sin * gain.roll(len(gain) // 2), eps)

    def forward(self, heads: Tensor, rows: slice, out: Tensor) -> None:
        """``heads [n, count, dim]``, which stand at ``rows``, into ``out``."""
        if self.eps is not None:
            heads, _ = normalised(heads, self.eps)
        torch.mul(heads, self.cos[rows], out=out)
        half = heads.shape[-1] // 2
        sin = self.sin[rows]
        out[..., :half].addcmul_(heads[..., half:], sin[..., :half])
        out[..., half:].addcmul_(heads[..., :half], sin[..., half:])

    def backward(self, grad: Tensor, heads: Tensor, rows: slice, out: Tensor) -> None:
        """The gradient by ``heads``, given that by what ``forward`` gave, into ``out``."""
        torch.mul(grad, self.cos[rows], out=out)
        half = heads.shape[-1] // 2
        sin = self.sin[rows]
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half])
        if self.eps is not None:
            normed, rstd = normalised(heads, self.eps)
            mean = (out * normed).mean(-1, keepdim=True).neg_()
            out.addcmul_(normed, mean).mul_(rstd)
