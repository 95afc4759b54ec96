"""Linear layers that read the same input, as one matrix that has their LoRA pairs in it.

For layers ``W_i`` with pairs ``(A_i, B_i)``, their scale s and a gain g on the input, the matrix is

    [ (W_1 + s B_1 A_1) g   s B_1     0   ]
    [ (W_2 + s B_2 A_2) g     0     s B_2 ]
    [         A_1 g           .       .   ]
    [         A_2 g           .       .   ]

One product with its left part gives the outputs and what A makes of the input; one product of the outputs' gradient
with its upper part gives the input's gradient and what B makes of the gradient. No pass over activations is left to
LoRA alone but the gradients of A and B. Making the matrix costs what some dozens of rows of input cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from nat_plugin_evsys.engine.machine.products import product, reordered

Pair = tuple[Tensor, Tensor]
"""``A [rank, in]`` and ``B [out, rank]``."""


@dataclass(frozen=True)
class LinearStack:
    """Frozen layers.

    Attributes:
        linears: ``[out_i, in]`` each.
        gain: (in,) factor on the input, such as a norm's weight; None means 1.
    """

    linears: Sequence[nn.Linear]
    gain: Tensor | None = None

    @property
    def inputs(self) -> int:
        """Width of the input."""
        return self.linears[0].in_features

    @property
    def outputs(self) -> int:
        """Sum of the layers' output widths."""
        return sum(linear.out_features for linear in self.linears)


class AdaptedStack:
    """A ``LinearStack`` with the LoRA pairs of a step; a layer's pair may be None.

    Attributes:
        ranks: sum of the pairs' ranks.
        outputs: of the stack.
        width: outputs + ranks, the columns of what ``forward`` gives.
    """

    def __init__(self, stack: LinearStack, pairs: Sequence[Pair | None], scale: float) -> None:
        self._stack = stack
        self._pairs = pairs
        self._scale = scale
        self.ranks = sum(len(pair[0]) for pair in pairs if pair)
        self.outputs = stack.outputs
        self.width = self.outputs + self.ranks
        self._grad_a: Tensor | None = None
        self._grad_b: list[Tensor | None] = [None] * len(pairs)

    @cached_property
    def _forward_weight(self) -> Tensor:
        return reordered(self._merged()[:, : self._stack.inputs])

    @cached_property
    def _backward_weight(self) -> Tensor:
        return reordered(self._merged()[: self.outputs].T)

    def _merged(self) -> Tensor:
        inputs, low = self._stack.inputs, 0
        weight = self._stack.linears[0].weight
        matrix = weight.new_empty(self.width, inputs + self.ranks)
        matrix[: self.outputs, inputs:] = 0
        for rows, linear, pair in self._layers():
            merged = matrix[rows, :inputs]
            merged.copy_(linear.weight)
            if pair:
                a, b = pair
                here = slice(low, low := low + len(a))
                merged.addmm_(b, a, alpha=self._scale)
                torch.mul(b, self._scale, out=matrix[rows, inputs:][:, here])
                matrix[self.outputs :, :inputs][here] = a
        if self._stack.gain is not None:
            matrix[:, :inputs] *= self._stack.gain
        return matrix

    def _layers(self) -> list[tuple[slice, nn.Linear, Pair | None]]:
        """``(its columns of the output, layer, pair)`` of each."""
        end = 0
        return [
            (slice(end, end := end + linear.out_features), linear, pair)
            for linear, pair in zip(self._stack.linears, self._pairs, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """``x [T, in] -> [T, width]``: the layers' outputs side by side, then ``g x A^T`` of each pair."""
        out = product(x, self._forward_weight)
        for rows, linear, _ in self._layers():
            if linear.bias is not None:
                out[:, rows] += linear.bias
        return out

    def backward(self, grad: Tensor, x: Tensor, low: Tensor, *, needs_x: bool = True) -> Tensor | None:
        """Adds to the pairs' gradients; returns the gradient by x [T, in] unless it is not needed.

        Args:
            grad: [T, out]. x: [T, in]. low: [T, ranks], the last columns of what ``forward`` gave.
            needs_x: whether x's gradient is wanted.
        """
        inputs = self._stack.inputs
        grad_x = None
        if needs_x:
            both = product(grad, self._backward_weight)
            grad_x, grad_low = both[:, :inputs], both[:, inputs:]
        else:
            of_pairs = [grad[:, rows] @ pair[1] for rows, _, pair in self._layers() if pair]
            grad_low = torch.cat(of_pairs, dim=1).mul_(self._scale) if of_pairs else grad[:, :0]
        if self.ranks:
            self._add_pair_gradients(grad, x, low, grad_low)
        return grad_x

    def _add_pair_gradients(self, grad: Tensor, x: Tensor, low: Tensor, grad_low: Tensor) -> None:
        self._grad_a = _plus_product(self._grad_a, grad_low.T, x)
        column = 0
        for i, (rows, _, pair) in enumerate(self._layers()):
            if pair:
                here = slice(column, column := column + len(pair[0]))
                # As rank x out: the product the other way round is slower.
                self._grad_b[i] = _plus_product(self._grad_b[i], low[:, here].T, grad[:, rows])

    def gradients(self) -> list[Tensor | None]:
        """Of all ``backward`` calls: ``[A_1, B_1, A_2, …]``, None for a layer without a pair."""
        out: list[Tensor | None] = []
        if self._grad_a is not None and self._stack.gain is not None:
            self._grad_a *= self._stack.gain
        column = 0
        for pair, grad_b in zip(self._pairs, self._grad_b, strict=True):
            if pair is None or self._grad_a is None or grad_b is None:
                out += [None, None]
                continue
            out += [self._grad_a[column : (column := column + len(pair[0]))], (grad_b * self._scale).T]
        return out


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else total.addmm_(a, b)
