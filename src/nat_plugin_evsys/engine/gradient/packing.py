"""Cuts a step's sequences into packs that fit in memory, where that repeats the fewest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nat_plugin_evsys.engine.machine.memory import TokenLimits
from nat_plugin_evsys.engine.tree.trie import Ids, SortedSequences, TokenTrie

_OVER_COMFORT = 0.1  # a tenth of the tokens above the comfortable size may be computed again to avoid them
_PER_PACK = 32  # what the start of a pack costs, in tokens


@dataclass(frozen=True)
class Pack:
    """Sequences that are computed together.

    Attributes:
        members: their indices in the step.
        trie: over them; ``trie.rows[i]`` belongs to ``members[i]``.
    """

    members: list[int]
    trie: TokenTrie


def plan_packs(sequences: Sequence[Ids], limits: TokenLimits) -> list[Pack]:
    """Every sequence is in exactly one pack, whole, with its prefix."""
    ordered = SortedSequences.build(sequences)
    packs = []
    for low, high in cut(ordered.lengths, ordered.shared, limits):
        members = ordered.order[low:high].tolist()
        shared = ordered.shared[low:high].copy()
        shared[0] = 0
        part = SortedSequences(np.arange(high - low), ordered.lengths[low:high], shared)
        packs.append(Pack(members, TokenTrie.build([sequences[i] for i in members], part)))
    return packs


def cut(lengths: Ids, shared: Ids, limits: TokenLimits) -> list[tuple[int, int]]:
    """Ranges ``[low, high)`` of sorted sequences, with the least rows in all that ``limits`` allow.

    A cut before sequence i repeats ``shared[i]`` tokens, so cuts go where little is shared. Dynamic programming over
    the last cut; the size of a pack ``[j, i)`` is ``lengths[j]`` plus what each later one adds.
    """
    count = len(lengths)
    # Rows of [0, i) were nothing cut; the pack [j, i) has total[i] - total[j] + shared[j].
    total = np.concatenate([[0], np.cumsum(lengths - shared)])
    best = np.zeros(count + 1)
    last = np.zeros(count + 1, dtype=np.int64)
    low = 0
    for i in range(1, count + 1):
        while low < i - 1 and total[i] - total[low] > limits.most:
            low += 1
        starts = np.arange(low, i)
        size = total[i] - total[starts] + shared[starts]
        cost = best[starts] + size + _OVER_COMFORT * np.maximum(0, size - limits.comfortable) + _PER_PACK
        cost[(size > limits.most) & (starts < i - 1)] = np.inf
        chosen = int(cost.argmin())
        best[i], last[i] = cost[chosen], starts[chosen]
    ranges = []
    end = count
    while end:
        ranges.append((int(last[end]), end))
        end = int(last[end])
    return ranges[::-1]
