"""Which rows of a token trie attend to which, as few calls of an attention kernel on slices, without a mask.

Rows stand in depth-first order (``trie``). Every chain attends causally to itself. The subtrees that hang from one
place of a chain are one contiguous run of rows, and all of them attend fully to the chain's rows above that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nat_plugin_evsys.engine.tree.flex_attention import descent_mask
from nat_plugin_evsys.engine.tree.trie import Chain, Ids, TokenTrie

_BLOCK, _MOST_BLOCKS = 64, 32
_SMALLEST_PIECE = 128  # queries; a call on fewer is slower than what an even share of the threads gains


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows at equal distances: block i is rows ``[start + i * step, start + i * step + length)``.

    They do not overlap, but for a step of 0, where all are the same rows.
    """

    start: int
    step: int
    length: int

    def of(self, tensor: Tensor, count: int) -> Tensor:
        """``[1, heads, rows, …] -> [count, heads, length, …]``, a view."""
        _, heads, row, *rest = tensor.stride()
        shape = (count, tensor.shape[1], self.length, *tensor.shape[3:])
        return tensor.as_strided(
            shape, (self.step * row, heads, row, *rest), tensor.storage_offset() + self.start * row
        )


@dataclass(frozen=True)
class Run:
    """``count`` blocks of queries, each with its block of keys: one call of a kernel."""

    count: int
    queries: Blocks
    keys: Blocks

    def shared_among(self, threads: int, heads: int) -> Iterator[Run]:
        """In pieces that are work for every thread, where each block and head is one thread's work."""
        if self.count > 1 or self.queries.length < 2 * _SMALLEST_PIECE:
            yield self
            return
        pieces = next((p for p in range(1, threads) if _waste(p * heads, threads) < 0.1), threads)
        length, rest = divmod(self.queries.length, pieces)
        if pieces == 1 or length < _SMALLEST_PIECE:
            yield self
            return
        start = self.queries.start
        keys = Blocks(self.keys.start, 0, self.keys.length)
        yield Run(pieces, Blocks(start, length, length), keys)
        if rest:
            yield Run(1, Blocks(start + pieces * length, 0, rest), keys)


def _waste(parts: int, threads: int) -> float:
    """Share of the threads' time in which some have nothing to do, when all parts take equally long."""
    return 1 - parts / (-(-parts // threads) * threads)


@dataclass(frozen=True)
class TreePlan:
    """Which slices attend to which. Queries are numbered among the rows that are read.

    Attributes:
        causal: every block attends causally to itself; together they are all queries, each once.
        descents: every block attends to all of its keys; none where every chain is one block and nothing is shared.
        subtree_ends: [T] int64 on the device; see ``TokenTrie.subtree_ends``.
    """

    causal: list[Run]
    descents: list[Run]
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
        return cls(
            list(_runs((_Call(b.start, b.end, b.start, b.end) for b in blocks), number)),
            list(_runs(descents, number)),
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


@dataclass(frozen=True)
class _Call:
    """Rows ``[start, end)``, those that are read, attend to rows ``[key_start, key_end)``."""

    start: int
    end: int
    key_start: int
    key_end: int


def _blocks(chain: Chain, is_read: Ids) -> Iterator[_Block]:
    """The chain's read rows in blocks of a bounded length.

    The causal kernel computes whole squares of up to 512 keys, so a long chain costs twice what its triangle needs.
    """
    longest = max(_BLOCK, (chain.end - chain.start) // _MOST_BLOCKS)
    edges = np.flatnonzero(np.diff(is_read[chain.start : chain.end].astype(np.int8), prepend=0, append=0)) + chain.start
    for first, end in edges.reshape(-1, 2).tolist():
        for start in range(first, end, longest):
            yield _Block(start, min(end, start + longest), chain.start)


def _above_in_chain(blocks: list[_Block]) -> Iterator[_Call]:
    for b in blocks:
        if b.chain_start < b.start:
            yield _Call(b.start, b.end, b.chain_start, b.start)


def _descents(chains: list[Chain]) -> Iterator[_Call]:
    """Chains that hang from the same row are neighbours but for their own subtrees: one call serves them all."""
    by_place: dict[tuple[int, int], list[int]] = {}
    for chain in chains:
        if chain.parent >= 0:
            span = by_place.setdefault((chain.parent, chain.attach), [chain.start, chain.subtree_end])
            span[1] = chain.subtree_end
    for (parent, attach), (start, end) in by_place.items():
        above = chains[parent].start
        yield _Call(start, end, above, above + attach)


def _runs(calls: Iterable[_Call], number: Ids) -> Iterator[Run]:
    """Calls of equal lengths whose queries and keys stand at equal distances are one."""
    by_lengths: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for c in calls:
        start = int(number[c.start])
        if length := int(number[c.end]) - start:
            by_lengths.setdefault((length, c.key_end - c.key_start), []).append((start, c.key_start))
    for (length, key_length), starts in by_lengths.items():
        starts.sort()
        at = 0
        while at < len(starts):
            count = _equally_far(starts, at, length, key_length)
            if count == 2 and _equally_far(starts, at + 1, length, key_length) > 2:
                count = 1  # any two are at equal distances: leave the second one to its own
            (start, key_start), (second, second_key) = starts[at], starts[at + min(1, count - 1)]
            keys = Blocks(key_start, second_key - key_start, key_length)
            yield Run(count, Blocks(start, second - start, length), keys)
            at += count


def _equally_far(starts: list[tuple[int, int]], at: int, length: int, key_length: int) -> int:
    """How many ``(query, key)`` starts from ``at`` on are as far apart as the first two, without overlap."""
    if at + 1 == len(starts):
        return 1
    (query, key), (second, second_key) = starts[at : at + 2]
    step, key_step = second - query, second_key - key
    if step < length or (key_step < key_length and key_step != 0):
        return 1
    count = 2
    while at + count < len(starts) and starts[at + count] == (query + count * step, key + count * key_step):
        count += 1
    return count
