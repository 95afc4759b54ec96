"""A decoder layer of the Llama shape as one autograd function, for fp32 on the CPU.

It computes what transformers' layer with its LoRA pairs computes: RMS norm, attention with rotary embedding (and
Qwen3's norms of queries and keys), RMS norm, SwiGLU. What it saves over that: products that read the same input are
one (``linear_stack``); everything but attention goes through in groups of rows that stay in the cache; and where only
some rows of the output are read, the others have keys and values but no queries, output projection or MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nat_plugin_evsys.engine.tree.attention import attend, attend_backward
from nat_plugin_evsys.engine.tree.linear_stack import AdaptedStack, LinearStack, Pair
from nat_plugin_evsys.engine.tree.plan import TreePlan
from nat_plugin_evsys.engine.tree.rotary import Rotary, normalised, plus_norm_gradient

_GROUP = 1024
"""Rows that go through the linear layers together: matrix products are at their peak from here on."""

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


@dataclass(frozen=True)
class FusedLayer:
    """The frozen part.

    Attributes:
        query, key_value, output, gate_up, down: the linear layers.
        query_norm, key_norm: (dim,) weights of the norms over a head, or None.
        names: module names of q, k, v, o, gate, up and down, in this order.
        heads, kv_heads, dim: of attention.
        scale: of attention scores.
        eps: of every norm.
    """

    query: LinearStack
    key_value: LinearStack
    output: LinearStack
    gate_up: LinearStack
    down: LinearStack
    query_norm: Tensor | None
    key_norm: Tensor | None
    names: Sequence[str]
    heads: int
    kv_heads: int
    dim: int
    scale: float
    eps: float


@dataclass(frozen=True)
class Rows:
    """Where the rows of a layer's input stand.

    Attributes:
        cos, sin: [T, 1, dim], of the rotary embedding; the first half of ``sin`` is negative.
        plan: attention of the read rows.
        read: (R,) rows whose output is wanted, rising; None means all.
    """

    cos: Tensor
    sin: Tensor
    plan: TreePlan
    read: Tensor | None = None

    def of_read(self, tensor: Tensor) -> Tensor:
        """The read rows of [T, …]."""
        return tensor if self.read is None else tensor[self.read]


def fused_layer(
    x: Tensor, layer: FusedLayer, rows: Rows, pairs: Sequence[Pair | None], scale: float, *, keep: bool = True
) -> Tensor:
    """``x [T, H] -> [R, H]``.

    Args:
        x: what the layer reads.
        layer, rows: see there.
        pairs: LoRA pairs in the order of ``layer.names``, fp32; their deltas are scaled by ``scale``.
        scale: alpha / rank.
        keep: keep what the backward pass needs; if not, it computes the layer again from x.
    """
    flat = [t for pair in pairs for t in (pair or (None, None))]
    out: Tensor = _FusedLayer.apply(x, layer, rows, scale, keep, *flat)  # type: ignore[no-untyped-call]  # torch gives apply() no types
    return out


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FusedLayer, rows: Rows, scale: float, keep: bool, *flat: Tensor | None
    ) -> Tensor:
        out, kept = _Step(layer, rows, scale, flat).forward(x)
        ctx.save_for_backward(x, *flat, *(kept if keep else ()))
        ctx.layer, ctx.rows, ctx.scale, ctx.pairs = layer, rows, scale, len(flat)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        step = _Step(ctx.layer, ctx.rows, ctx.scale, saved[: ctx.pairs])
        kept = saved[ctx.pairs :] or step.forward(x)[1]
        grad_x = step.backward(grad, x, kept, needs_x=ctx.needs_input_grad[0])
        return grad_x, None, None, None, None, *step.gradients()


class _Step:
    """One layer's forward or backward pass with one adapter."""

    def __init__(self, layer: FusedLayer, rows: Rows, scale: float, flat: Sequence[Tensor | None]) -> None:
        pairs = [None if a is None or b is None else (a, b) for a, b in zip(flat[::2], flat[1::2], strict=True)]
        self._layer, self._rows = layer, rows
        self._query = AdaptedStack(layer.query, pairs[:1], scale)
        self._key_value = AdaptedStack(layer.key_value, pairs[1:3], scale)
        self._output = AdaptedStack(layer.output, pairs[3:4], scale)
        self._gate_up = AdaptedStack(layer.gate_up, pairs[4:6], scale)
        self._down = AdaptedStack(layer.down, pairs[6:], scale)
        self._query_rotary = Rotary.build(rows.of_read(rows.cos), rows.of_read(rows.sin), layer.query_norm, layer.eps)
        self._key_rotary = Rotary.build(rows.cos, rows.sin, layer.key_norm, layer.eps)

    def gradients(self) -> list[Tensor | None]:
        """Of the LoRA pairs, in the order of ``layer.names``."""
        stacks = (self._query, self._key_value, self._output, self._gate_up, self._down)
        return [g for stack in stacks for g in stack.gradients()]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``(output [R, H], what backward needs besides x)``."""
        layer, x_read = self._layer, self._rows.of_read(x)
        q_low = self._projected(x_read, self._query)
        kv_low = self._projected(x, self._key_value)
        q, k = self._heads(q_low, kv_low)
        out, lse = attend(_first(q), _first(k), _first(self._values(kv_low)), self._rows.plan, layer.scale)
        attended = out[0].transpose(0, 1).flatten(1)
        middle, result = torch.empty_like(x_read), torch.empty_like(x_read)
        o_low, d_low = (x.new_empty(len(x_read), stack.ranks) for stack in (self._output, self._down))
        gu_low: list[Tensor] = []
        half = self._gate_up.outputs // 2
        for s in _groups(x_read):
            both = self._output.forward(attended[s])
            o_low[s] = both[:, self._output.outputs :]
            torch.add(x_read[s], both[:, : self._output.outputs], out=middle[s])
            gate_up = self._gate_up.forward(normalised(middle[s], layer.eps)[0])
            gu_low.append(gate_up)
            both = self._down.forward(_swiglu(gate_up[:, :half], gate_up[:, half : 2 * half]))
            d_low[s] = both[:, self._down.outputs :]
            torch.add(middle[s], both[:, : self._down.outputs], out=result[s])
        return result, (q_low, kv_low, attended, lse, middle, o_low, d_low, *gu_low)

    def backward(self, grad: Tensor, x: Tensor, kept: Sequence[Tensor], *, needs_x: bool) -> Tensor | None:
        """Gradient by x, given that by the output; those by the pairs accumulate."""
        q_low, kv_low, attended, lse, middle, o_low, d_low, *gu_low = kept
        layer, rows = self._layer, self._rows
        grad_middle, grad_attended = torch.empty_like(middle), torch.empty_like(attended)
        for s, gate_up in zip(_groups(middle), gu_low, strict=True):
            grad_middle[s] = self._mlp_backward(grad[s], middle[s], gate_up, d_low[s])
            grad_attended[s] = _some(self._output.backward(grad_middle[s], attended[s], o_low[s]))
        q, k = self._heads(q_low, kv_low)
        by_head = (layer.heads, layer.dim)
        out, grad_out = _first(attended.unflatten(1, by_head)), _first(grad_attended.unflatten(1, by_head))
        found = attend_backward(
            grad_out, _first(q), _first(k), _first(self._values(kv_low)), out, lse, rows.plan, layer.scale
        )
        dq, dk, dv = (g[0].transpose(0, 1) for g in found)
        of_keys = self._projected_backward(x, self._key_value, kv_low, self._key_rotary, dk, dv, needs_x)
        of_queries = self._projected_backward(
            rows.of_read(x), self._query, q_low, self._query_rotary, dq, None, needs_x, grad_middle
        )
        if of_keys is None or of_queries is None:
            return None
        return of_keys.add_(of_queries) if rows.read is None else of_keys.index_add_(0, rows.read, of_queries)

    def _projected(self, x: Tensor, stack: AdaptedStack) -> Tensor:
        """``stack`` of the normed input."""
        out = x.new_empty(len(x), stack.width)
        for s in _groups(x):
            out[s] = stack.forward(normalised(x[s], self._layer.eps)[0])
        return out

    def _projected_backward(
        self, x: Tensor, stack: AdaptedStack, low: Tensor, rotary: Rotary, rotated: Tensor, plain: Tensor | None,
        needs_x: bool, residual: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """``residual`` plus the gradient by x, given those by the rotated heads and by those that are not rotated."""
        grad_x = torch.empty_like(x) if needs_x else None
        for s in _groups(x):
            normed, rstd = normalised(x[s], self._layer.eps)
            grad = x.new_empty(len(normed), stack.outputs)
            heads = grad.unflatten(1, (-1, self._layer.dim))
            count = rotated.shape[1]
            rotary.backward(
                rotated[s], low[s][:, : count * self._layer.dim].unflatten(1, (count, -1)), s, heads[:, :count]
            )
            if plain is not None:
                heads[:, count:] = plain[s]
            grad_normed = stack.backward(grad, normed, low[s][:, stack.outputs :], needs_x=needs_x)
            if grad_x is not None:
                to = x.new_zeros(()) if residual is None else residual[s]
                grad_x[s] = plus_norm_gradient(to, _some(grad_normed), normed, rstd)
        return grad_x

    def _heads(self, q_low: Tensor, kv_low: Tensor) -> tuple[Tensor, Tensor]:
        """Normed and rotated queries ``[R, heads, dim]`` and keys ``[T, kv_heads, dim]``."""
        found = []
        for low, count, rotary in (
            (q_low, self._layer.heads, self._query_rotary),
            (kv_low, self._layer.kv_heads, self._key_rotary),
        ):
            heads = low[:, : count * self._layer.dim].unflatten(1, (count, self._layer.dim))
            out = torch.empty(heads.shape)
            for s in _groups(heads):
                rotary.forward(heads[s], s, out[s])
            found.append(out)
        return found[0], found[1]

    def _values(self, kv_low: Tensor) -> Tensor:
        """``[T, kv_heads, dim]``."""
        width = self._layer.kv_heads * self._layer.dim
        values: Tensor = kv_low[:, width : 2 * width].unflatten(1, (self._layer.kv_heads, self._layer.dim))
        return values

    def _mlp_backward(self, grad: Tensor, middle: Tensor, gu_low: Tensor, d_low: Tensor) -> Tensor:
        """``grad`` plus what comes through the MLP."""
        half = self._gate_up.outputs // 2
        gate, up = gu_low[:, :half], gu_low[:, half : 2 * half]
        grad_gu = grad.new_empty(len(grad), 2 * half)
        silu, active = grad_gu[:, half:], torch.empty_like(up)
        _silu(gate, out=silu)
        torch.mul(silu, up, out=active)
        grad_active = _some(self._down.backward(grad, active, d_low))
        silu *= grad_active
        _silu_backward(torch.mul(grad_active, up, out=active), gate, grad_input=grad_gu[:, :half])
        normed, rstd = normalised(middle, self._layer.eps)
        grad_normed = _some(self._gate_up.backward(grad_gu, normed, gu_low[:, 2 * half :]))
        return plus_norm_gradient(grad, grad_normed, normed, rstd)


def _groups(rows: Tensor) -> Iterator[slice]:
    for start in range(0, len(rows), _GROUP):
        yield slice(start, min(start + _GROUP, len(rows)))


def _first(heads: Tensor) -> Tensor:
    """[T, heads, dim] -> [1, heads, T, dim]."""
    return heads.transpose(0, 1)[None]


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = torch.ops.aten.silu(gate).mul_(up)
    return product


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
