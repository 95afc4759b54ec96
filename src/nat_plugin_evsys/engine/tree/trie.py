"""The token trie of a step's sequences, stored as rows: each distinct prefix has one row.

Sequences are sorted, and each one adds only what its predecessor does not have. Rows therefore stand in depth-first
order: the ancestors of a row come before it, and the rows below it follow it without a gap. A maximal run of rows in
which each is the parent of the next is a *chain*; the trie is a tree of chains, and attention needs no mask (see
``plan``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Ids = np.ndarray
"""int64 (N,)."""


@dataclass(frozen=True)
class SortedSequences:
    """Token sequences in lexicographic order.

    Attributes:
        order: (D,) ``order[i]`` is the index, as given, of the i-th sequence in sorted order.
        lengths: (D,) in sorted order.
        shared: (D,) tokens that the i-th sorted sequence shares with its predecessor; ``shared[0]`` is 0.
    """

    order: Ids
    lengths: Ids
    shared: Ids

    @classmethod
    def build(cls, sequences: Sequence[Ids]) -> SortedSequences:
        """Sort by memory comparison of big-endian ids; O(total tokens) besides the sort's own comparisons."""
        keys = [np.ascontiguousarray(s, dtype=">u4").tobytes() for s in sequences]
        order = sorted(range(len(keys)), key=lambda i: keys[i])
        shared = [0] + [_common_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
        lengths = [len(sequences[i]) for i in order]
        return cls(np.array(order, dtype=np.int64), np.array(lengths, np.int64), np.array(shared, np.int64))


@dataclass(frozen=True)
class Chain:
    """Rows ``[start, end)``, each the parent of the next.

    Attributes:
        parent: index of the chain that this one hangs from, -1 for a root.
        attach: how many rows of the parent chain are ancestors of this one, at least 1; 0 for a root.
        subtree_end: rows ``[start, subtree_end)`` are this chain and all that hangs from it.
    """

    start: int
    end: int
    parent: int
    attach: int
    subtree_end: int


@dataclass(frozen=True)
class TokenTrie:
    """The trie over some sequences.

    Attributes:
        tokens: (T,) the token of each row.
        depths: (T,) how many ancestors a row has, which is its position id.
        rows: for each sequence, in the order given to ``build``, the row of each of its positions.
        chains: in row order.
    """

    tokens: Ids
    depths: Ids
    rows: list[Ids]
    chains: list[Chain]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(cls, sequences: Sequence[Ids], ordered: SortedSequences | None = None) -> TokenTrie:
        """Of non-empty sequences; ``ordered`` saves sorting them again."""
        ordered = ordered or SortedSequences.build(sequences)
        pieces: list[Ids] = []
        rows: list[Ids] = [np.empty(0, np.int64)] * len(sequences)
        chains = _ChainBuilder()
        path = np.empty(0, np.int64)
        size = 0
        for index, shared in zip(ordered.order.tolist(), ordered.shared.tolist(), strict=True):
            own = sequences[index][shared:]
            chains.add(shared, path, size, len(own))
            path = np.concatenate([path[:shared], np.arange(size, size + len(own))])
            rows[index] = path
            pieces.append(own)
            size += len(own)
        tokens = np.concatenate(pieces)
        depths = np.empty(size, np.int64)
        for path in rows:
            depths[path] = np.arange(len(path))
        return cls(tokens, depths, rows, chains.finish(size))

    def subtree_ends(self) -> Ids:
        """(T,) ``e`` such that row q descends from row k, or is k, if and only if ``k <= q < e[k]``."""
        ends = np.empty(len(self), np.int64)
        for chain in self.chains:
            ends[chain.start : chain.end] = chain.end
        # A row of a chain reaches to the end of the last subtree that hangs below it.
        for chain in reversed(self.chains):
            if chain.parent >= 0:
                up = self.chains[chain.parent]
                above = ends[up.start : up.start + chain.attach]
                np.maximum(above, chain.subtree_end, out=above)
        return ends


class _ChainBuilder:
    """Chains as the sorted sequences come in."""

    def __init__(self) -> None:
        self._start: list[int] = []
        self._end: list[int] = []
        self._parent: list[int] = []
        self._attach: list[int] = []

    def add(self, shared: int, path: Ids, size: int, count: int) -> None:
        """``count`` new rows from ``size`` on, below the first ``shared`` rows of ``path``."""
        if count == 0:
            return
        above = int(path[shared - 1]) if shared else -1
        if above >= 0 and above == size - 1:
            self._end[-1] = size + count  # the row above is the last one: the chain goes on
            return
        parent = -1 if above < 0 else int(np.searchsorted(self._start, above, side="right")) - 1
        self._attach.append(above - self._start[parent] + 1 if parent >= 0 else 0)
        self._parent.append(parent)
        self._start.append(size)
        self._end.append(size + count)

    def finish(self, size: int) -> list[Chain]:
        """All chains, with the ends of their subtrees."""
        ends = list(self._end)
        for i in range(len(ends) - 1, -1, -1):
            if self._parent[i] >= 0:
                ends[self._parent[i]] = max(ends[self._parent[i]], ends[i])
        return [Chain(*c) for c in zip(self._start, self._end, self._parent, self._attach, ends, strict=True)]


def _common_prefix(a: Ids, b: Ids) -> int:
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    first = int(different.argmax()) if shorter else 0
    return first if shorter and different[first] else shorter
