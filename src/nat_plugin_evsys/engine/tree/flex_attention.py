"""Trie attention by FlexAttention, for GPUs. Its output is tested on the CPU; its speed has not been measured."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128  # rows and keys of a block, as FlexAttention has them by default
_COMPILATIONS = 64
"""Each shape of a model's heads is one, and each dtype. Beyond Dynamo's limit attention is dense, without an error."""


def descent_mask(subtree_ends: Tensor) -> Any:
    """The block mask of a trie: row q attends to row k if and only if ``k <= q < subtree_ends[k]``.

    It is built block by block, of ``(T / 128)**2`` of them; torch's ``create_block_mask`` makes the T x T mask first.
    """
    rows = len(subtree_ends)
    blocks = -(-rows // _BLOCK)
    ends = torch.nn.functional.pad(subtree_ends, (0, blocks * _BLOCK - rows)).view(blocks, _BLOCK)
    key = torch.arange(blocks, device=subtree_ends.device)
    query = key[:, None]
    # Below the diagonal every key comes before every row: only the ends of the subtrees decide.
    some = (key <= query) & (query * _BLOCK < ends.amax(dim=1))
    every = (key < query) & ((query + 1) * _BLOCK <= ends.amin(dim=1))

    def descends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < subtree_ends[k])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=_BLOCK, mask_mod=descends, seq_lengths=(rows, rows)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``chosen [blocks, blocks]`` -> how many each row has, and the row's blocks with the chosen ones first."""
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32)[None, None], order.int()[None, None]


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float) -> Tensor:
    """``query [1, heads, T, dim]``, ``key`` and ``value [1, kv_heads, T, dim]`` -> ``[1, heads, T, dim]``.

    The kernel is compiled for a GPU. On the CPU, where it serves as a check only, it runs as dense attention.
    """
    function: Any = flex_attention
    if query.device.type == "cuda":
        allow_compilations()
        function = _compiled()
    out: Tensor = function(
        query, key, value, block_mask=block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


def allow_compilations() -> None:
    """Raise Dynamo's limit for the calling thread: a setting of Dynamo is of the context that made it."""
    if torch._dynamo.config.recompile_limit < _COMPILATIONS:
        torch._dynamo.config.recompile_limit = _COMPILATIONS


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
