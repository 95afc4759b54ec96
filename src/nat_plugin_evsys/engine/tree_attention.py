"""Attention over a token trie without a mask, through transformers' ``AttentionInterface``.

Rows stand in depth-first order (``trie``). Every chain attends causally to itself. The subtrees that hang from one
place of a chain are one contiguous run of rows, and all of them attend fully to the chain's rows above that place. So
a trie is a few calls of a flash kernel on slices, merged by their log-sum-exps:
``o = lerp(o1, o2, sigmoid(l2 - l1))``, ``l = logaddexp(l1, l2)``. The kernel's backward takes the merged output and
log-sum-exp, which makes the gradient of each call exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nat_plugin_evsys.engine.flex_attention import descent_mask, flex_tree_attention
from nat_plugin_evsys.engine.trie import Chain, TokenTrie

IMPLEMENTATION = "evsys_tree"
"""The name in ``AttentionInterface``: SDPA as transformers has it, but trie attention inside ``attending``."""


@dataclass(frozen=True)
class CausalRun:
    """``count`` chains of ``length`` rows each, one after the other from row ``start`` on."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class Descent:
    """Rows ``[query_start, query_end)`` attend to all of ``[key_start, key_end)``, their ancestors."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass(frozen=True)
class TreePlan:
    """Which slices attend to which.

    Attributes:
        causal: together they are all rows, each once.
        descents: none where no sequences share anything.
        subtree_ends: [T] int64 on the device; see ``TokenTrie.subtree_ends``.
    """

    causal: list[CausalRun]
    descents: list[Descent]
    subtree_ends: Tensor

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device) -> TreePlan:
        """The calls that attend along every path of ``trie``."""
        causal = []
        for length, chains in groupby(trie.chains, key=lambda c: c.end - c.start):
            run = list(chains)
            causal.append(CausalRun(run[0].start, len(run), length))
        return cls(causal, list(_descents(trie.chains)), torch.from_numpy(trie.subtree_ends()).to(device))

    @cached_property
    def block_mask(self) -> Any:
        """For FlexAttention; one serves all layers."""
        return descent_mask(self.subtree_ends)


def _descents(chains: list[Chain]) -> Iterator[Descent]:
    """Chains that hang from the same row are neighbours but for their own subtrees: one call serves them all."""
    by_place: dict[tuple[int, int], list[int]] = {}
    for chain in chains:
        if chain.parent >= 0:
            span = by_place.setdefault((chain.parent, chain.attach), [chain.start, chain.subtree_end])
            span[1] = chain.subtree_end
    for (parent, attach), (start, end) in by_place.items():
        above = chains[parent].start
        yield Descent(start, end, above, above + attach)


_ACTIVE: ContextVar[TreePlan | None] = ContextVar("evsys_tree_plan", default=None)


@contextmanager
def attending(plan: TreePlan) -> Iterator[None]:
    """Forward passes of a model that is ``installed``, in this thread or task, attend along ``plan``."""
    token = _ACTIVE.set(plan)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def install(model: PreTrainedModel) -> bool:
    """Let ``model`` attend along tries inside ``attending``; elsewhere it computes what it did before.

    Returns whether that is possible: the model must choose its attention through ``AttentionInterface`` and use SDPA.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == IMPLEMENTATION:
        return True
    if config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    # Only the text decoder reads tries; the setter would change a vision tower's attention too.
    config._attn_implementation_internal = IMPLEMENTATION
    return True


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _ACTIVE.get() is None else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [1, heads, T, dim]``, ``key`` and ``value [1, kv_heads, T, dim]`` -> ``[1, T, heads, dim]``."""
    plan = _ACTIVE.get()
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        return tree_attention(query, key, value, plan, scale).transpose(1, 2), None
    out = flex_tree_attention(query, key, value, plan.block_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def tree_attention(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Exact attention of every row to itself and its ancestors, on the CPU.

    Args:
        query: [1, heads, T, dim]. key, value: [1, kv_heads, T, dim]; heads is a multiple of kv_heads.
        plan: of the trie whose T rows these are.
        scale: of the scores.

    Returns:
        [1, heads, T, dim], in memory [1, T, heads, dim]. No tensor larger than that is made.
    """
    out: Tensor = _TreeAttention.apply(query, key, value, plan, scale)
    return out


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> Tensor:
        _, heads, rows, dim = query.shape
        out = query.new_empty(1, rows, heads, dim).transpose(1, 2)
        lse = query.new_empty(1, rows, heads, dtype=torch.float32).transpose(1, 2)
        for run in plan.causal:
            part, part_lse = _flash(*(_chains(t, run) for t in (query, key, value)), 0.0, True, scale=scale)
            _chains(out, run).copy_(part)
            _lse_chains(lse, run).copy_(part_lse)
        for d in plan.descents:
            q, k, v = _slices(query, key, value, d)
            part, part_lse = _flash(q, k, v, 0.0, False, scale=scale)
            _merge(out[:, :, d.query_start : d.query_end], lse[:, :, d.query_start : d.query_end], part, part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        for run in ctx.plan.causal:
            q, k, v, o, g = (_chains(t, run) for t in (query, key, value, out, grad))
            parts = _flash_backward(g, q, k, v, o, _lse_chains(lse, run), 0.0, True, scale=ctx.scale)
            for whole, part in zip(grads, parts, strict=True):
                _chains(whole, run).copy_(part)
        for d in ctx.plan.descents:
            q, k, v = _slices(query, key, value, d)
            g, o, here = (t[:, :, d.query_start : d.query_end] for t in (grad, out, lse))
            parts = _flash_backward(g, q, k, v, o, here, 0.0, False, scale=ctx.scale)
            for whole, part in zip(_slices(grads[0], grads[1], grads[2], d), parts, strict=True):
                whole.add_(part)
        return grads[0], grads[1], grads[2], None, None


def _chains(tensor: Tensor, run: CausalRun) -> Tensor:
    """[1, heads, T, dim] -> [count, heads, length, dim], a view of the run's rows."""
    rows = tensor[0, :, run.start : run.start + run.count * run.length]
    return rows.unflatten(1, (run.count, run.length)).transpose(0, 1)


def _lse_chains(lse: Tensor, run: CausalRun) -> Tensor:
    """[1, heads, T] -> [count, heads, length]."""
    rows = lse[0, :, run.start : run.start + run.count * run.length]
    return rows.unflatten(1, (run.count, run.length)).transpose(0, 1)


def _slices(query: Tensor, key: Tensor, value: Tensor, d: Descent) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(d.key_start, d.key_end)
    return query[:, :, d.query_start : d.query_end], key[:, :, keys], value[:, :, keys]


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put another share of the keys into ``out`` and ``lse``, in place."""
    out.lerp_(part, torch.sigmoid(part_lse - lse).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))
