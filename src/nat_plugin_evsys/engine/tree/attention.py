"""Attention over a token trie without a mask, through transformers' ``AttentionInterface``.

A trie is a few calls of a flash kernel on slices (``plan``), merged by their log-sum-exps:
``o = lerp(o1, o2, sigmoid(l2 - l1))``, ``l = logaddexp(l1, l2)``. The kernel's backward takes the merged output and
log-sum-exp, which makes the gradient of each call exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nat_plugin_evsys.engine.tree.flex_attention import flex_tree_attention
from nat_plugin_evsys.engine.tree.plan import Run, TreePlan

IMPLEMENTATION = "evsys_tree"
"""The name in ``AttentionInterface``: SDPA as transformers has it, but trie attention inside ``attending``."""

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
    out: Tensor = _TreeAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]  # torch gives apply() no types
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
        part, part_lse = _flash(*_blocks(run, (query,), (key, value)), 0.0, True, scale=scale)
        run.queries.of(out, run.count).copy_(part)
        run.queries.of(lse, run.count).copy_(part_lse)
    for run in plan.descents:
        part, part_lse = _flash(*_blocks(run, (query,), (key, value)), 0.0, False, scale=scale)
        _merge(run.queries.of(out, run.count), run.queries.of(lse, run.count), part, part_lse)
    return out, lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: TreePlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value, given that by ``out``; the rest as ``attend`` took and returned it."""
    grad_query = torch.empty_like(query)
    whole_rows = query.shape[2] == key.shape[2]
    grad_key, grad_value = ((torch.empty_like if whole_rows else torch.zeros_like)(t) for t in (key, value))
    for run in plan.causal:
        g, q, o, here, k, v = _blocks(run, (grad, query, out, lse), (key, value))
        parts = _flash_backward(g, q, k, v, o, here, 0.0, True, scale=scale)
        for whole, part in zip(_blocks(run, (grad_query,), (grad_key, grad_value)), parts, strict=True):
            whole.copy_(part)
    threads, heads = torch.get_num_threads(), key.shape[1]
    for run in (piece for whole in plan.descents for piece in whole.shared_among(threads, heads)):
        g, q, o, here, k, v = _blocks(run, (grad, query, out, lse), (key, value))
        by_query, *by_rest = _flash_backward(g, q, k, v, o, here, 0.0, False, scale=scale)
        run.queries.of(grad_query, run.count).add_(by_query)
        for whole, part in zip((grad_key, grad_value), by_rest, strict=True):
            _add(whole, run, part)
    return grad_query, grad_key, grad_value


def _blocks(run: Run, by_query: Sequence[Tensor], by_key: Sequence[Tensor]) -> list[Tensor]:
    """Views of the run's blocks, ``[count, heads, length, …]`` each."""
    return [run.queries.of(t, run.count) for t in by_query] + [run.keys.of(t, run.count) for t in by_key]


def _add(whole: Tensor, run: Run, part: Tensor) -> None:
    """Add ``part [count, kv_heads, keys, dim]`` to the run's rows of a gradient."""
    if run.keys.step == 0:
        run.keys.of(whole, 1).add_(part.sum(0) if run.count > 1 else part)
    else:
        run.keys.of(whole, run.count).add_(part)


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put another share of the keys into ``out`` and ``lse``, in place."""
    out.lerp_(part, torch.sigmoid(part_lse - lse).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, part_lse))
