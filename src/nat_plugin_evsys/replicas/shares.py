"""Shares a step's sequences out among replicas by the distinct tokens that each has to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nat_plugin_evsys.engine.tree.trie import Ids, SortedSequences

_SLACK = 1.05
"""The largest share may be this many times the least possible, if prefixes stay together by that."""


@dataclass(frozen=True)
class Shares:
    """A plan.

    Attributes:
        members: for each replica the indices of its sequences, ascending; may be empty.
        tokens: distinct tokens of each share, which is what it costs.
        distinct: distinct tokens of all sequences together.
    """

    members: list[list[int]]
    tokens: list[int]
    distinct: int

    def metrics(self) -> dict[str, float]:
        """``replicas:max``; ``replica_imbalance:max``, the largest share over the mean one (1 is balanced); and
        ``replica_repeated_tokens:sum``, computed by more than one replica because a prefix was cut."""
        total = sum(self.tokens)
        return {
            "replicas:max": float(len(self.tokens)),
            "replica_imbalance:max": max(self.tokens) * len(self.tokens) / total,
            "replica_repeated_tokens:sum": float(total - self.distinct),
        }


def share_out(sequences: Sequence[Ids], replicas: int) -> Shares:
    """Every sequence is in one share. The plan depends on the arguments alone.

    Sequences in lexicographic order are the leaves of the prefix tree from left to right, so a share is a range of
    them, and a cut before sequence i repeats the ``shared[i]`` tokens that it has in common with its predecessor. Of
    all cuts whose largest share is at most a twentieth above the least possible, the one that repeats the fewest
    tokens is taken: a group is cut only where the work could not be balanced otherwise.
    """
    ordered = SortedSequences.build(sequences)
    # Distinct tokens of [0, i) were nothing cut; a share [j, i) has total[i] - total[j] + shared[j].
    total = np.concatenate([[0], np.cumsum(ordered.lengths - ordered.shared)])
    least = _least_largest(total, ordered.shared, replicas)
    ranges = _cut(total, ordered.shared, replicas, int(_SLACK * least))
    members = [sorted(ordered.order[low:high].tolist()) for low, high in ranges]
    tokens = [int(total[high] - total[low] + ordered.shared[low]) for low, high in ranges]
    empty = replicas - len(ranges)
    return Shares(members + [[] for _ in range(empty)], tokens + [0] * empty, int(total[-1]))


def _least_largest(total: Ids, shared: Ids, replicas: int) -> int:
    """The smallest size that some cut into ``replicas`` ranges has for its largest one, by bisection."""
    count = len(shared)
    low = int(max(np.max(total[1:] - total[:-1] + shared), -(-int(total[-1]) // replicas)))
    high = int(total[-1])
    while low < high:
        middle = (low + high) // 2
        end, ranges = 0, 0
        while end < count and ranges < replicas:
            # The furthest end of a range that begins here.
            end = int(np.searchsorted(total, middle + total[end] - shared[end], side="right")) - 1
            ranges += 1
        low, high = (low, middle) if end >= count else (middle + 1, high)
    return low


def _cut(total: Ids, shared: Ids, replicas: int, most: int) -> list[tuple[int, int]]:
    """Ranges of at most ``most`` tokens each, with the fewest tokens in all, by dynamic programming over the last."""
    count = len(shared)
    best = np.full((replicas + 1, count + 1), np.inf)
    best[0, 0] = 0
    last = np.zeros((replicas + 1, count + 1), dtype=np.int64)
    first = 0
    for end in range(1, count + 1):
        while total[end] - total[first] + shared[first] > most:
            first += 1
        starts = np.arange(first, end)
        cost = best[:-1, first:end] + (total[end] - total[starts] + shared[starts])
        fits = total[end] - total[starts] + shared[starts] <= most
        cost[:, ~fits] = np.inf
        chosen = cost.argmin(axis=1)
        best[1:, end] = cost[np.arange(replicas), chosen]
        last[1:, end] = starts[chosen]
    ranges: list[tuple[int, int]] = []
    end, number = count, int(best[:, count].argmin())
    while end:
        start = int(last[number, end])
        ranges.append((start, end))
        end, number = start, number - 1
    return ranges[::-1]
