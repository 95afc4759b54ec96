"""Trie attention by FlexAttention, for GPUs. Its output is tested on the CPU; its speed has not been measured."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def descent_mask(subtree_ends: Tensor) -> Any:
    """The block mask of a trie: row q attends to row k if and only if ``k <= q < subtree_ends[k]``."""
    rows = len(subtree_ends)

    def descends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_ends[k])

    return create_block_mask(descends, None, None, rows, rows, device=str(subtree_ends.device))


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float) -> Tensor:
    """``query [1, heads, T, dim]``, ``key`` and ``value [1, kv_heads, T, dim]`` -> ``[1, heads, T, dim]``.

    The kernel is compiled for a GPU. On the CPU, where it serves as a check only, it runs as dense attention.
    """
    function: Any = _compiled() if query.device.type == "cuda" else flex_attention
    out: Tensor = function(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
