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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nat_plugin_evsys.engine.flex_attention import descent_mask, flex_tree_attention
from nat_plugin_evsys.engine.trie import Chain, Ids, TokenTrie

IMPLEMENTATION = "evsys_tree"
"""The name in ``AttentionInterface``: SDPA as transformers has it, but trie attention inside ``attending``."""

_BLOCK, _MOST_BLOCKS = 64, 32


@dataclass(frozen=True)
class CausalRun:
    """``count`` blocks of ``length`` rows each; every block attends causally to itself.

    Attributes:
        query_start: the first block's first query; the blocks' queries stand one after the other.
        key_start, key_step: the first block's first row, and from one block's to the next one's.
    """

    query_start: int
    key_start: int
    key_step: int
    count: int
    length: int


@dataclass(frozen=True)
class Descent:
    """Queries ``[query_start, query_end)`` attend to all of the rows ``[key_start, key_end)``, their ancestors."""

    query_start: int
    query_end: int
    key_start: int
    key_end: int


@dataclass(frozen=True)
class TreePlan:
    """Which slices attend to which. Queries are numbered among the rows that are read.

    Attributes:
        causal: together they are all queries, each once.
        descents: none where every chain is one block and no sequences share anything.
        subtree_ends: [T] int64 on the device; see ``TokenTrie.subtree_ends``.
    """

    causal: list[CausalRun]
    descents: list[Descent]
    subtree_ends: Tensor

    @classmethod
    def build(cls, trie: TokenTrie, device: torch.device, read: Ids | None = None) -> TreePlan:
        """The calls that attend along every path of ``trie``, for all rows or for those of ``read``, rising."""
        is_read = np.ones(len(trie), dtype=bool)
        if read is not None:
            is_read[:] = False
            is_read[read] = True
        number = np.concatenate([[0], np.cumsum(is_read)])
        blocks = [b for chain in trie.chains for b in _blocks(chain, is_read)]
        descents = [*_above_in_chain(blocks), *_descents(trie.chains)]
        numbered = [
            Descent(int(number[d.query_start]), int(number[d.query_end]), d.key_start, d.key_end) for d in descents
        ]
        return cls(
            list(_runs(blocks, number)),
            [d for d in numbered if d.query_start < d.query_end],
            torch.from_numpy(trie.subtree_ends()).to(device),
        )

    @cached_property
    def block_mask(self) -> Any:
        """For FlexAttention; one serves all layers."""
        return descent_mask(self.subtree_ends)


@dataclass(frozen=True)
class _Block:
    """Read rows ``[start, end)`` of a chain that starts at ``chain_start``."""

    start: int
    end: int
    chain_start: int


def _blocks(chain: Chain, is_read: Ids) -> Iterator[_Block]:
    """The chain's read rows in blocks of a bounded length.

    The causal kernel computes whole squares of up to 512 keys, so a long chain costs twice what its triangle needs.
    """
    longest = max(_BLOCK, (chain.end - chain.start) // _MOST_BLOCKS)
    edges = np.flatnonzero(np.diff(is_read[chain.start : chain.end].astype(np.int8), prepend=0, append=0)) + chain.start
    for first, end in edges.reshape(-1, 2).tolist():
        for start in range(first, end, longest):
            yield _Block(start, min(end, start + longest), chain.start)


def _above_in_chain(blocks: list[_Block]) -> Iterator[Descent]:
    for b in blocks:
        if b.chain_start < b.start:
            yield Descent(b.start, b.end, b.chain_start, b.start)


def _runs(blocks: list[_Block], number: Ids) -> Iterator[CausalRun]:
    """Neighbouring blocks of equal length at equal distances are one call."""
    at = 0
    while at < len(blocks):
        first = blocks[at]
        length, count = first.end - first.start, 1
        step = blocks[at + 1].start - first.start if at + 1 < len(blocks) else 0
        while at + count < len(blocks):
            b = blocks[at + count]
            if b.end - b.start != length or b.start != first.start + count * step:
                break
            count += 1
        yield CausalRun(int(number[first.start]), first.start, step, count, length)
        at += count


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
        out, lse = attend(query, key, value, plan, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, lse = ctx.saved_tensors
        return *attend_backward(grad, query, key, value, out, lse, ctx.plan, ctx.scale), None, None


def attend(query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float) -> tuple[Tensor, Tensor]:
    """``tree_attention`` without autograd, where ``query [1, heads, R, dim]`` may be of the plan's read rows only.

    Returns:
        ``(out [1, heads, R, dim], log-sum-exp of the scores [1, heads, R])``, in memory [1, R, heads, …].
    """
    _, heads, rows, dim = query.shape
    out = query.new_empty(1, rows, heads, dim).transpose(1, 2)
    lse = query.new_empty(1, rows, heads, dtype=torch.float32).transpose(1, 2)
    for run in plan.causal:
        k, v = _key_blocks(key, run), _key_blocks(value, run)
        part, part_lse = _flash(_query_blocks(query, run), k, v, 0.0, True, scale=scale)
        _query_blocks(out, run).copy_(part)
        _query_blocks(lse, run).copy_(part_lse)
    for d in plan.descents:
        q, k, v = _slices(query, key, value, d)
        part, part_lse = _flash(q, k, v, 0.0, False, scale=scale)
        _merge(out[:, :, d.query_start : d.query_end], lse[:, :, d.query_start : d.query_end], part, part_lse)
    return out, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: TreePlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value, given that by ``out``; the rest as ``attend`` took and returned it."""
    grad_query = torch.empty_like(query)
    whole_rows = query.shape[2] == key.shape[2]
    grad_key, grad_value = ((torch.empty_like if whole_rows else torch.zeros_like)(t) for t in (key, value))
    for run in plan.causal:
        q, o, g = (_query_blocks(t, run) for t in (query, out, grad))
        k, v = _key_blocks(key, run), _key_blocks(value, run)
        parts = _flash_backward(g, q, k, v, o, _query_blocks(lse, run), 0.0, True, scale=scale)
        _query_blocks(grad_query, run).copy_(parts[0])
        _key_blocks(grad_key, run).copy_(parts[1])
        _key_blocks(grad_value, run).copy_(parts[2])
    for d in plan.descents:
        q, k, v = _slices(query, key, value, d)
        g, o, here = (t[:, :, d.query_start : d.query_end] for t in (grad, out, lse))
        parts = _flash_backward(g, q, k, v, o, here, 0.0, False, scale=scale)
        for whole, part in zip(_slices(grad_query, grad_key, grad_value, d), parts, strict=True):
            whole.add_(part)
    return grad_query, grad_key, grad_value


def _query_blocks(tensor: Tensor, run: CausalRun) -> Tensor:
    """[1, heads, R, …] -> [count, heads, length, …], a view of the run's queries."""
    return _strided_blocks(tensor, run.query_start, run.length, run)


def _key_blocks(tensor: Tensor, run: CausalRun) -> Tensor:
    """[1, heads, T, …] -> [count, heads, length, …], a view of the run's rows."""
    return _strided_blocks(tensor, run.key_start, run.key_step, run)


def _strided_blocks(tensor: Tensor, start: int, step: int, run: CausalRun) -> Tensor:
    _, heads, row, *rest = tensor.stride()
    shape = (run.count, tensor.shape[1], run.length, *tensor.shape[3:])
    return tensor.as_strided(shape, (step * row, heads, row, *rest), tensor.storage_offset() + start * row)


def _slices(query: Tensor, key: Tensor, value: Tensor, d: Descent) -> tuple[Tensor, Tensor, Tensor]:
    keys = slice(d.key_start, d.key_end)
    return query[:, :, d.query_start : d.query_end], key[:, :, keys], value[:, :, keys]


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put another share of the keys into ``out`` and ``lse``, in place."""
    out.lerp_(part, torch.sigmoid(part_lse - lse).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))
